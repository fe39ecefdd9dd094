"""Triton kernels without a GPU: run by Triton's interpreter, or compiled to machine code from the launches themselves.

Launches that are compiled need no memory: tensors may be on meta, and as large as real ones.

Import this before anything imports triton: its standard library is interpreted only if the variable is there by then.
`TRITON_INTERPRET=0 python triton_interpreter.py <test module> <arch>...` calls the module's `launches(arch)` with every
launch turned into a compilation, and prints one JSON line for each. An arch below 1 compiles nothing: what it would
compile is printed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).resolve().parents[2] / ".cache" / "triton"))

import numpy as np
import triton
import triton.language as tl
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter, jit

SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program may have (CUDA programming guide)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


def multiply_bf16() -> None:
    """The interpreter (3.7) keeps bf16 as its bits and multiplies those; here it multiplies the numbers."""
    plain = interpreter.InterpreterBuilder.create_dot

    def widened(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def round_bf16() -> None:
    """The interpreter (3.7) cuts float32 off where a GPU rounds to the nearest bf16, and casts the bits of others."""
    plain = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src: interpreter.TensorHandle, dst_type: tl.dtype) -> interpreter.TensorHandle:
        to = dst_type.scalar
        if src.dtype.scalar == tl.bfloat16 and to != tl.bfloat16:
            wide = (src.data.astype(np.uint32) << 16).view(np.float32)
            src = interpreter.TensorHandle(wide, tl.float32)
        if to != tl.bfloat16 or src.dtype.scalar == tl.bfloat16:
            return plain(self, src, dst_type) if src.dtype.scalar != to else src
        bits = np.ascontiguousarray(src.data.astype(np.float32)).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = np.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, nearest)
        return interpreter.TensorHandle(nearest.astype(np.uint16), tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


def widen_e5m2() -> None:
    """The interpreter (3.7) makes other numbers of e5m2's smallest; each is the high half of the fp16 it becomes."""
    plain = interpreter._convert_float

    def convert(x: np.ndarray, dtype: tl.dtype, to: tl.dtype, rounding: object) -> np.ndarray:
        if (dtype, to) == (tl.float8e5, tl.float16):
            return x.astype(np.uint16) << 8
        return plain(x, dtype, to, rounding)

    interpreter._convert_float = convert


def count_with_numpy() -> None:
    """numpy (2.4) makes no int of an array of one; a loop bound of the interpreter (before 3.7) is such an array."""
    plain = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def refuse_unknown_arguments() -> None:
    """The interpreter drops named arguments that a kernel does not have; a GPU refuses them."""
    plain = interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        unknown = set(kwargs) - set(self.arg_names) - set(OPTIONS)
        if unknown:
            raise TypeError(f"{self.fn.__name__} has no argument {sorted(unknown)}")
        return plain(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = launch


def refuse_overflow() -> None:
    """Numbers of 32 bits wrap around in silence, here and on a GPU; nowhere do our kernels mean them to."""

    def checked(name: str, exact: np.ufunc) -> None:
        plain = getattr(interpreter.InterpreterBuilder, name)

        def compute(self, a: interpreter.TensorHandle, b: interpreter.TensorHandle) -> interpreter.TensorHandle:
            result = plain(self, a, b)
            if result.dtype.scalar == tl.int32:
                wide = exact(a.data, b.data, dtype=np.int64)
                if not np.array_equal(wide, result.data):
                    raise OverflowError(f"{name} of int32: {wide.min()} to {wide.max()}")
            return result

        setattr(interpreter.InterpreterBuilder, name, compute)

    for name, exact in (("create_add", np.add), ("create_sub", np.subtract), ("create_mul", np.multiply)):
        checked(name, exact)


def copy_nothing_back() -> None:
    """The interpreter copies every storage it was given onto itself: a large one of which little is used would fill."""
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None


def patch_once() -> None:
    """The interpreter patches the language for every call of a device function; once a launch and module will do."""
    patched: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def launch_unpatched(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_unpatched
    interpreter.InterpretedFunction.__call__ = call


if triton.knobs.runtime.interpret:
    refuse_unknown_arguments()
    refuse_overflow()
    copy_nothing_back()
    patch_once()
    multiply_bf16()
    round_bf16()
    widen_e5m2()
    count_with_numpy()


def paths_of(module: str) -> str:
    """PYTHONPATH of a process that imports a test's module."""
    helpers = Path(__file__).parent
    folder = next(helpers.parent.rglob(f"{module}.py")).parent
    return os.pathsep.join([str(helpers), str(folder), os.environ.get("PYTHONPATH", "")])


def compile_launches(module: str, *archs: int) -> list[dict]:
    """Compiles what `module.launches(arch)` launches, in a process of its own: one entry a kernel, types and arch."""
    command = [sys.executable, "-P", __file__, module, *map(str, archs)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths_of(module)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fits(entries: list[dict]) -> None:
    for entry in entries:
        assert entry["shared"] <= SHARED_LIMITS[entry["arch"]], entry


def source_of(kernel: jit.JITFunction, args: tuple, kwargs: dict) -> ASTSource:
    bound = kernel.signature.bind(*args, **{k: v for k, v in kwargs.items() if k not in OPTIONS}).arguments
    types, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = bound[param.name]
        is_one = type(value) is int and value == 1 and not param.do_not_specialize
        if param.is_constexpr or value is None or is_one:
            types[param.name], constants[(i,)] = "constexpr", value
            continue
        types[param.name] = jit.mangle_type(value)
        if param.do_not_specialize:
            continue
        address = value.data_ptr() if hasattr(value, "data_ptr") else value
        if type(address) is int and address % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, types, constants, attributes)


def _code(done: triton.compiler.CompiledKernel) -> dict:
    """Facts of machine code: registers, bytes of the stack (spills), matrix instructions by kind, differences
    that a product was fused with, and the bytes of its accesses: `copies` (global to shared memory, asynchronous),
    `loads`, `stores`."""
    ptx, cubin = done.asm["ptx"], Path(f"{os.environ['TRITON_CACHE_DIR']}/{os.getpid()}.cubin")
    cubin.write_bytes(done.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    cubin.unlink()

    def widths(access: str) -> list[int]:
        found = re.findall(rf"{access}\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)", ptx)
        return sorted({int(count or 1) * int(bits) // 8 for count, bits in found})

    negated = set(re.findall(r"neg\.f32\s+(%\w+)", ptx))
    added = re.findall(r"fma\.rn\.f32\s+[^;]*, (%\w+);", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (0x\w+|\d+)", ptx)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync"), "divisions": ptx.count("div.rn."),
        "fused_differences": sum(number in negated for number in added),
        "loads": widths("ld"), "stores": widths("st"), "copies": sorted({int(size, 0) for size in copies}),
        "waits": [int(count) for count in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)],
    }  # fmt: skip


def _main(module: str, *archs: str) -> None:
    seen, loaded = set(), importlib.import_module(module)
    for arch in map(int, archs):

        def compile_instead(kernel, *args, grid, warmup, arch=arch, **kwargs):
            source = source_of(kernel, args, kwargs)
            options = {k: v for k, v in kwargs.items() if k in OPTIONS}
            key = (source.hash(), str(options), arch)
            if key in seen:
                return
            seen.add(key)
            if arch < 1:
                entry = {"kernel": kernel.__name__, "arch": arch, "types": source.signature}
                print(json.dumps(entry), flush=True)
                return
            began = time.perf_counter()
            done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            seconds = round(time.perf_counter() - began, 2)
            entry = {"kernel": kernel.__name__, "arch": arch, "shared": done.metadata.shared, "seconds": seconds}
            constants = {kernel.params[i].name: value for (i,), value in source.constants.items()}
            details = {"types": source.signature, "constants": constants, "code": _code(done)}
            print(json.dumps(entry | details), flush=True)

        jit.JITFunction.run = compile_instead
        loaded.launches(arch)


if __name__ == "__main__":
    _main(*sys.argv[1:])
