"""Measures the card's limits, then each kernel and the model against them, and writes the table.

python measure.py TABLE.md
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path

import cpp
import torch
import triton
from kernels import Made, Sizes, measure_cases, measure_kernels, measure_limits
from llama import Load, Runner, against_transformers, measure_model
from mixed import measure_mixed
from overlap import measure_overlap
from serving import Batch, measure_serving
from table import CardClock, Limits, Table

from fuseline.compile.kernels.cuda_library import library_for
from fuseline.compile.target import detect_target
from fuseline.engine.run.card import CudaDevice


def main(out: Path) -> int:
    out.parent.mkdir(parents=True, exist_ok=True)
    table, sizes, load = Table(out, title()), Sizes(), Load()
    clock = CardClock()
    problems = []

    def attempt(what: str, call: Callable[[], object]) -> None:
        """A part that fails leaves its mark in the table, and the next one runs."""
        try:
            call()
        except Exception as error:
            traceback.print_exc()
            problems.append(what)
            table.add(what, f"FAILED: {type(error).__name__}: {str(error)[:100]}")
        torch.cuda.empty_cache()

    limits = measure_limits(sizes, "cuda", clock, table)
    with tempfile.TemporaryDirectory() as folder:
        runners: list[Runner] = []
        target = detect_target(device="cuda")
        attempt("model", lambda: runners.append(Runner(Path(folder), target, load)))
        for runner in runners:
            attempt("steps of the model", lambda r=runner: measure_model(r, load, limits, table))
            attempt("early launches", lambda r=runner: measure_overlap(r, target, load, limits, table))
            attempt("mixed steps", lambda r=runner: measure_mixed(r, 32, (64, 224, 480), load.context, table))
            attempt("engine", lambda r=runner: measure_serving(r, CudaDevice(target), Batch(), table))
            attempt("transformers", lambda r=runner: against_transformers(r, table, Path(folder)))
        runners.clear()
    attempt("kernels", lambda: measure_kernels(sizes, detect_target(device="cuda"), clock, limits, table))
    attempt("kernels in C++", lambda: measure_cpp(sizes, clock, limits, table))
    print(table.text(table.title))
    return 1 if problems else 0


def measure_cpp(sizes: Sizes, clock: CardClock, limits: Limits, table: Table) -> None:
    library = library_for(detect_target(device="cuda"))
    if library is None:
        raise RuntimeError("not built: nvcc is not installed, or the library does not load")
    measure_cases(cpp.cases(sizes, Made(sizes, "cuda"), library), clock, limits, table)


def title() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, python {platform.python_version()}"
    return f"{torch.cuda.get_device_name()}, {date.today()}, commit {commit or 'unknown'}, {versions}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
