"""The choices of `-O3` for the shape of an 8B Llama, how long they take to measure, and the speedup of decode steps.

python tune.py TABLE.md
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from fuseline.compile.target import Target, detect_target
from gpu_check.llama import LLAMA_8B, Load, Runner
from gpu_check.table import Table


def main(out: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), detect_target(device="cuda"), Load(), Table.resumed(out))
    return 0


def compare(folder: Path, target: Target, load: Load, table: Table, shape: dict = LLAMA_8B) -> None:
    """Times the same steps with the default kernels and with the measured choice."""
    for name, is_tuned in (("default", False), ("-O3", True)):
        started = time.perf_counter()
        runner = Runner(folder, target, load, shape, is_tuned)
        table.add(f"{name}: built", f"{time.perf_counter() - started:.0f} s")
        for label, count in sorted(runner.kernels.items()):
            if label.startswith("triton.") or "linear" in label or "|" in label:
                table.add(f"{name}: kernel", f"{count} x {label}")
        table.add(f"{name}: runs of ops in one launch", f"up to {runner.rows_of_runs} rows")
        runner.capture()
        for num_seqs in load.batches:
            seconds, _ = runner.decode(num_seqs, load.context, load.steps)
            table.add(f"{name}: decode {num_seqs} x {load.context}", f"{seconds * 1e3:.2f} ms a step")
        runner.model.stop_capture()
        del runner
        if target.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
