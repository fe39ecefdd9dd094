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

import torch
import triton
from kernels import Sizes, measure_kernels, measure_limits
from llama import Load, Runner, against_transformers, measure_model
from serving import Batch, measure_serving
from table import CardClock, Table

from fuseline.compile.target import detect_target
from fuseline.engine.run.card import CudaDevice


def main(out: Path) -> int:
    table, sizes, load = Table(), Sizes(), Load()
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
            attempt("engine", lambda r=runner: measure_serving(r, CudaDevice(target), Batch(), table))
            attempt("transformers", lambda r=runner: against_transformers(r, table, Path(folder)))
        runners.clear()
    attempt("kernels", lambda: measure_kernels(sizes, "cuda", clock, limits, table))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table.text(title()))
    print(table.text(title()))
    return 1 if problems else 0


def title() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, python {platform.python_version()}"
    return f"{torch.cuda.get_device_name()}, {date.today()}, commit {commit or 'unknown'}, {versions}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
