"""The kernels of csrc/cuda on a CPU: their sources compiled by g++ over csrc/tests/cuda_emulation.h."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuseline.compile.kernels.cuda.library import CudaLibrary, Overlap

ISA = "sm_90"
"""Whose instructions `run` takes; tools/gpu_check puts the GPU's in its place."""
ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
sys.path.insert(0, str(CSRC / "cuda"))
import nvcc as toolkit  # noqa: E402

COMMAND = (
    "g++", "-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE", "-fno-gnu-unique", f"-I{CSRC}", f"-I{CSRC / 'include'}",
)  # fmt: skip
"""Some g++ (Ubuntu's) fortify by themselves: a longjmp to another thread's stack then ends the process. A unique symbol
would be the same object for this library and for a GPU's in one process."""


@functools.cache
def emulator() -> CudaLibrary:
    """Built once for these sources; several processes may."""
    parts = [*toolkit.SOURCES]
    for folder in ("cuda", "tests", "include/fuseline"):
        parts += [path for path in (CSRC / folder).iterdir() if path.suffix in (".h", ".def")]
    content = "".join(path.read_text() for path in sorted(parts)) + " ".join(COMMAND)
    folder = ROOT / ".cache" / "cuda_emulator" / hashlib.sha256(content.encode()).hexdigest()[:16]
    library = folder / "emulator.so"
    if not library.exists():
        own = folder / str(os.getpid())
        own.mkdir(parents=True, exist_ok=True)
        objects = [own / f"{source.stem}.o" for source in toolkit.SOURCES]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(_compile, toolkit.SOURCES, objects))
        subprocess.run(["g++", "-shared", "-Wl,-Bsymbolic", *objects, "-o", own / "emulator.so"], check=True)
        os.replace(own / "emulator.so", library)
    return CudaLibrary(library)


def _compile(source: Path, target: Path) -> None:
    subprocess.run([*COMMAND, "-c", "-x", "c++", source, "-o", target], check=True)


def build_program(text: str, folder: Path) -> Path:
    """A program over the emulation's headers."""
    source, program = folder / "program.cpp", folder / "program"
    source.write_text(text)
    subprocess.run([*COMMAND, source, "-o", program], check=True)
    return program


def run(function: Callable, *args: object, **more: object) -> object:
    """A function of compile/kernels/cuda by the emulator; tools/gpu_check puts the GPU's in its place.

    The weights that it is given are constants.
    """
    return function(emulator().overlapping(Overlap.WEIGHTS), *args, **more)
