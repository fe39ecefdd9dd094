"""Compiles, for cards that need not be there, the kernels of every combination of arguments that launchers can get.

`TRITON_INTERPRET=0 python triton_combinations.py <module> <arch>...` prints one JSON line a distinct compilation of what
the module's CASES launch: kernel, arch, which arguments are None, the types of the others, and the error if there is
one. The combinations of the whole product go as far as Triton's own intermediate code, where a None that is used like a
number is found; those of its pairs become machine code.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import triton
import triton_interpreter
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime import jit

FP8_OF_NEW_CARDS = "fp8e4nv"  # the only type whose code Triton makes, or refuses to make, by the card


def compile_combinations(module: str, *archs: int) -> list[dict]:
    """In a process of its own: in this one Triton interprets."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-P", __file__, module, *map(str, archs)], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


class Compiler:
    """Stands in for a kernel's launch."""

    def __init__(self, arch: int, seen: set[tuple], to_machine_code: bool) -> None:
        self._target, self._seen, self._is_whole = GPUTarget("cuda", arch, 32), seen, to_machine_code

    def launch(self, kernel: jit.JITFunction, args: tuple, kwargs: dict) -> None:
        options = {key: value for key, value in kwargs.items() if key in triton_interpreter.OPTIONS}
        source = triton_interpreter.source_of(kernel, args, kwargs)
        if not self._is_whole:
            source.attrs.clear()
        arch = self._target.arch if self._is_whole or FP8_OF_NEW_CARDS in str(source.signature) else 0
        key = (source.hash(), str(options), arch)
        if key in self._seen:
            return
        self._seen.add(key)
        entry = {
            "kernel": kernel.__name__, "arch": self._target.arch, "is_whole": self._is_whole,
            "none": [kernel.params[i].name for (i,), value in source.constants.items() if value is None],
            "types": {name: type for name, type in source.signature.items() if type != "constexpr"},
        }  # fmt: skip
        print(json.dumps(entry | self._compiled(source, options)), flush=True)

    def _compiled(self, source: ASTSource, options: dict) -> dict:
        try:
            if self._is_whole:
                return {"shared": triton.compile(source, target=self._target, options=options).metadata.shared}
            self._make_intermediate_code(source, options)
            return {}
        except Exception as error:  # whatever the compiler makes of it is the finding
            return {"error": f"{type(error).__name__}: {error}"}

    def _make_intermediate_code(self, source: ASTSource, options: dict) -> None:
        backend = make_backend(self._target)
        options = backend.parse_options(options)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        module = source.make_ir(self._target, options, codegen, modules, context)
        stages: dict[str, Callable] = {}
        backend.add_stages(stages, options, source.language)
        stages["ttir"](module, {"target": self._target, **vars(options)})


def main(module: str, *archs: str) -> None:
    cases, seen = importlib.import_module(module).CASES, set()
    for arch in map(int, archs):
        for is_whole in (False, True):
            compiler = Compiler(arch, seen, is_whole)

            def compile_instead(kernel, *args, grid, warmup, compiler=compiler, **kwargs):
                compiler.launch(kernel, args, kwargs)

            jit.JITFunction.run = compile_instead
            for case in cases:
                for choice in case.pairs(arch) if is_whole else case.whole(arch):
                    case.run(choice)


if __name__ == "__main__":
    main(*sys.argv[1:])
