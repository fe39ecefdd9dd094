"""Limits of a machine, measured with torch: memory bandwidth and rate of matrix products, for shares of kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fuseline import _C
from fuseline.compile.tuning.clock import Clock

MOVED_BYTES = 1 << 30
"""Size of what is read or copied: far larger than any cache."""
CPU_SIZE = 2048
"""Rows, columns and depth of the product that a CPU is measured with."""


@dataclass(frozen=True)
class Limits:
    """`bandwidth`: bytes moved a second. `matrix_rate`: floating-point operations a second, 2 for each multiply-add."""

    bandwidth: float
    matrix_rate: float


def measure_limits(
    clock: Clock, device: str = "cpu", dtype: torch.dtype = torch.float32, num_bytes: int = MOVED_BYTES,
    size: int = CPU_SIZE,
) -> Limits:  # fmt: skip
    """Limits of the device, on a CPU with the threads that torch is set to."""
    return Limits(memory_bandwidth(clock, device, num_bytes), matrix_rate(clock, device, dtype, size))


def memory_bandwidth(clock: Clock, device: str = "cpu", num_bytes: int = MOVED_BYTES) -> float:
    """Bytes a second: on a CPU read by a sum, on a GPU read and written by a copy, which saturates it."""
    if device == "cpu":
        data = torch.ones(num_bytes // 8, dtype=torch.float64)
        return num_bytes / clock(data.sum)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / clock(lambda: target.copy_(source))


def matrix_rate(clock: Clock, device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = CPU_SIZE) -> float:
    """Operations a second of torch's square product.

    A CPU is measured in float32; its rate in bfloat16 is twice that where it has an instruction for bf16 dot products.
    """
    is_cpu = device == "cpu"
    a, b = (torch.randn(size, size, device=device).to(torch.float32 if is_cpu else dtype) for _ in range(2))
    is_double = is_cpu and dtype == torch.bfloat16 and _C.cpu_isa().endswith("bf16")
    return (2 if is_double else 1) * 2 * size**3 / clock(lambda: a @ b)
