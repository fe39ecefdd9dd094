"""What this machine can do: read bandwidth and fp32 matrix rate, measured with torch, for shares in other benchmarks.

    python benchmarks/machine.py
"""

from __future__ import annotations

import os
import time

import torch

READ_BYTES = 1 << 30


def best(run, repeats: int = 7) -> float:
    """Shortest seconds of several: what the machine can do, whatever neighbours took of the others."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth(threads: int) -> float:
    """Bytes per second of a sum over memory far larger than the caches."""
    torch.set_num_threads(threads)
    data = torch.ones(READ_BYTES // 8, dtype=torch.float64)
    return READ_BYTES / best(data.sum)


def matrix_rate(threads: int, size: int = 2048) -> float:
    """Floating-point operations per second of torch's fp32 product."""
    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / best(lambda: a @ b)


def main() -> None:
    for threads in range(1, len(os.sched_getaffinity(0)) + 1):
        bandwidth, rate = read_bandwidth(threads), matrix_rate(threads)
        print(f"{threads} threads: read {bandwidth / 1e9:.1f} GB/s, fp32 product {rate / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
