"""Compiles, for GPUs that need not be there, the kernels of every combination of arguments that launchers can get.

`TRITON_INTERPRET=0 python triton_combinations.py <module> <arch>...` prints one JSON line a distinct compilation of
what the module's CASES launch: kernel, arch, which arguments are None, the types of the others, the error if there is
one. What is of the whole product becomes Triton's own code (ttir), in whose making a None that is used like a number is
found, and which is the same for all GPUs but for one type; what is of its pairs becomes LLVM's for the last arch.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time

import triton_interpreter
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime import jit

FP8_OF_NEW_GPUS = "fp8e4nv"  # the only type of whose code the making depends on the GPU
SUM = re.compile(
    r'"tt\.reduce"\([^)]*\) <\{axis = (\d+) : i32\}> \(\{((?:(?!\}\) :).)*)\}\) : \(tensor<([\dx]+)xf32', re.DOTALL
)


def compile_combinations(module: str, *archs: int) -> list[dict]:
    """In a process of its own: in this one Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-P", __file__, module, *map(str, archs)], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": triton_interpreter.paths_of(module)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


class Compiler:
    """Stands in for a kernel's launch; `last` is the stage up to which it compiles."""

    def __init__(self, arch: int, last: str, seen: set[tuple]) -> None:
        self._target, self._last, self._seen = GPUTarget("cuda", arch, 32), last, seen

    def launch(self, kernel: jit.JITFunction, args: tuple, kwargs: dict) -> None:
        options = {key: value for key, value in kwargs.items() if key in triton_interpreter.OPTIONS}
        source = triton_interpreter.source_of(kernel, args, kwargs)
        if self._last == "ttir":
            source.attrs.clear()
        is_same = self._last == "ttir" and FP8_OF_NEW_GPUS not in str(source.signature)
        key = (source.hash(), str(options), self._last, 0 if is_same else self._target.arch)
        if key in self._seen:
            return
        self._seen.add(key)
        entry = {
            "kernel": kernel.__name__, "arch": self._target.arch, "stage": self._last,
            "none": [kernel.params[i].name for (i,), value in source.constants.items() if value is None],
            "types": {name: type for name, type in source.signature.items() if type != "constexpr"},
            "fused": options.get("enable_fp_fusion", True),
        }  # fmt: skip
        began = time.perf_counter()
        found = self._compiled(source, options)
        seconds = round(time.perf_counter() - began, 2)
        print(json.dumps(entry | found | {"seconds": seconds}), flush=True)

    def _compiled(self, source: ASTSource, options: dict) -> dict:
        try:
            code = str(self._code(source, options))
            return {"sums": sums(code)} if self._last == "ttir" else {}
        except Exception as error:  # whatever the compiler raises is the finding
            return {"error": f"{type(error).__name__}: {error}"}

    def _code(self, source: ASTSource, options: dict) -> object:
        backend = make_backend(self._target)
        options = backend.parse_options(options)
        context, stages, metadata = ir.context(), {}, {"target": self._target, **vars(options)}
        ir.load_dialects(context)
        backend.load_dialects(context)
        codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        code = source.make_ir(self._target, options, codegen, modules, context)
        backend.add_stages(stages, options, source.language)
        for name, stage in stages.items():
            code = stage(code, metadata)
            if name == self._last:
                return code
        raise ValueError(f"there is no stage {self._last}")


def sums(code: str) -> list[int]:
    """How many numbers each sum of float32 adds."""
    found = (match for match in SUM.finditer(code) if "arith.addf" in match[2])
    return sorted({int(match[3].split("x")[int(match[1])]) for match in found})


def main(module: str, *archs: str) -> None:
    cases, seen = importlib.import_module(module).CASES, set()
    for arch in map(int, archs):
        for last in ("ttir", "llir") if str(arch) == archs[-1] else ("ttir",):
            compiler = Compiler(arch, last, seen)

            def compile_instead(kernel, *args, grid, warmup, compiler=compiler, **kwargs):
                compiler.launch(kernel, args, kwargs)

            jit.JITFunction.run = compile_instead
            for case in cases:
                for choice in case.whole(arch) if last == "ttir" else case.pairs(arch):
                    case.run(choice)


if __name__ == "__main__":
    main(*sys.argv[1:])
