"""Limits of this machine: read bandwidth and fp32 matrix rate for each number of threads.

    python benchmarks/machine.py
"""

from __future__ import annotations

import os

import torch

from fuseline.compile.tuning.clock import HostClock
from fuseline.compile.tuning.limits import Limits, measure_limits


def limits_of(threads: int) -> Limits:
    """Limits with `threads` torch threads."""
    torch.set_num_threads(threads)
    return measure_limits(HostClock())


def main() -> None:
    for threads in range(1, len(os.sched_getaffinity(0)) + 1):
        limits = limits_of(threads)
        speeds = f"read {limits.bandwidth / 1e9:.1f} GB/s, fp32 product {limits.matrix_rate / 1e9:.0f} GFLOP/s"
        print(f"{threads} threads: {speeds}")


if __name__ == "__main__":
    main()
