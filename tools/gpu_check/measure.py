"""Measures the GPU's limits, then each kernel and the model against them, and writes the table.

python measure.py TABLE.md MARKS      MARKS: folder of what is not done (failures.py)

A part that fails is marked in the table, and the next one runs; it runs in a new process if the GPU accepts no more
calls from this one, as after an illegal memory access.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from fuseline.compile.backends.cuda.graph_api import CaptureStreams, CudaGraphApi
from fuseline.compile.kernels.cuda.library import library_for
from fuseline.compile.target import detect_target
from fuseline.compile.tuning.clock import Clock, DeviceClock
from fuseline.compile.tuning.limits import Limits
from fuseline.engine.run.cuda_device import CudaDevice
from gpu_check.chains import measure_chains
from gpu_check.kernels import Made, Sizes, measure_kernels, measure_limits
from gpu_check.llama import Load, Runner, measure_model
from gpu_check.mixed import measure_mixed
from gpu_check.overlap import measure_overlap
from gpu_check.peer import against_transformers
from gpu_check.serving import Batch, measure_serving
from gpu_check.table import Table, is_gpu_lost, run_part

Part = tuple[str, Callable[[], object]]


def main(out: Path, marks: Path, num_done: int = 0) -> int:
    """`num_done`: number of parts that a previous process finished; its last one failed."""
    table, clock, sizes = Table.resumed(out), DeviceClock(), Sizes()
    limits = measure_limits(sizes, "cuda", clock, table)
    with tempfile.TemporaryDirectory() as folder:
        parts = model_parts(Path(folder), limits, table, num_done > 0) + kernel_parts(sizes, clock, limits, table)
        failed = run_parts(parts, num_done, (table, marks), is_gpu_lost, lambda done: start_again(out, marks, done))
    return 1 if failed or num_done else 0


def run_parts(
    parts: list[Part], num_done: int, into: tuple[Table, Path], is_lost: Callable[[], bool],
    start_again: Callable[[int], None],
) -> list[str]:  # fmt: skip
    """Returns the names of failed parts. `start_again` does not return; it gets the number of finished parts."""
    failed = []
    for at, (name, call) in enumerate(parts):
        if at < num_done or run_part(name, call, *into):
            continue
        failed.append(name)
        if is_lost():
            start_again(at + 1)
    return failed


def start_again(out: Path, marks: Path, num_done: int) -> None:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", __file__, str(out), str(marks), str(num_done)])


def model_parts(folder: Path, limits: Limits, table: Table, is_resumed: bool) -> list[Part]:
    """All parts share one model, which the first of them builds and captures, unless that is done."""
    target, load = detect_target(device="cuda"), Load()

    def make() -> Runner:
        runner = Runner(folder, target, load)
        if is_resumed:
            runner.capture()
        return runner

    made = Once(make)
    return [
        ("steps of the model", lambda: measure_model(made(), load, limits, table)),
        ("early launches", lambda: measure_overlap(made(), target, load, limits, table)),
        ("mixed steps", lambda: measure_mixed(made(), 32, (64, 224, 480), load.context, table)),
        ("engine", lambda: measure_serving(made(), CudaDevice(target), Batch(), table)),
        ("transformers", lambda: against_transformers(made(), CudaDevice(target), table, folder)),
        ("model given back", made.forget),
    ]


def kernel_parts(sizes: Sizes, clock: Clock, limits: Limits, table: Table) -> list[Part]:
    def chains() -> None:
        library, api = library_for(detect_target(device="cuda")), CudaGraphApi(CaptureStreams.of(torch.device("cuda")))
        measure_chains(sizes, Made(sizes, "cuda"), library, api, table, clock, limits)

    return [
        ("chains of layers", chains),
        ("kernels", lambda: measure_kernels(sizes, detect_target(device="cuda"), clock, limits, table)),
        ("kernels in C++", check_cpp),
    ]


class Once:
    """Creates a value on first use. A failed creation is not tried again."""

    def __init__(self, make: Callable[[], Runner]) -> None:
        self._make: Callable[[], Runner] | None = make
        self._made: Runner | None = None

    def __call__(self) -> Runner:
        if self._made is None:
            if self._make is None:
                raise RuntimeError("there is no model")
            make, self._make = self._make, None
            self._made = make()
        return self._made

    def forget(self) -> None:
        self._made = None
        torch.cuda.empty_cache()


def check_cpp() -> None:
    """Raises RuntimeError where the kernels in C++ are not among those that are measured."""
    if library_for(detect_target(device="cuda")) is None:
        raise RuntimeError("not built: nvcc is not installed, or the library does not load")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])))
