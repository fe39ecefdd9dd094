"""Limits of a machine, measured with torch: memory bandwidth and matrix product rate, to rate kernels against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fuseline import _C
from fuseline.compile.tuning.clock import Clock

MOVED_BYTES = 1 << 30
"""Bytes read or copied, far more than any cache holds."""
CPU_SIZE = 2048
"""Rows, columns and depth of the product measured on a CPU."""
BF16_DOT = ("avx512bf16", "amx")
"""Instruction sets whose kernels have a dot product of bf16."""


@dataclass(frozen=True)
class Limits:
    """`bandwidth`: bytes moved a second. `matrix_rate`: floating-point operations a second, 2 for each multiply-add."""

    bandwidth: float
    matrix_rate: float


def measure_limits(
    clock: Clock, device: str = "cpu", dtype: torch.dtype = torch.float32, num_bytes: int = MOVED_BYTES,
    size: int = CPU_SIZE,
) -> Limits:  # fmt: skip
    """Measures the device's limits; a CPU uses torch's current number of threads."""
    return Limits(memory_bandwidth(clock, device, num_bytes), matrix_rate(clock, device, dtype, size))


def memory_bandwidth(clock: Clock, device: str = "cpu", num_bytes: int = MOVED_BYTES) -> float:
    """Bytes per second: a CPU reads for a sum, a GPU reads and writes for a copy, which saturates it."""
    if device == "cpu":
        data = torch.ones(num_bytes // 8, dtype=torch.float64)
        return num_bytes / clock(data.sum)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / clock(lambda: target.copy_(source))


def matrix_rate(clock: Clock, device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = CPU_SIZE) -> float:
    """Operations per second of torch's square matrix product.

    A CPU is measured in float32; its rate in bfloat16 is twice that where it has an instruction for bf16 dot products.
    """
    is_cpu = device == "cpu"
    a, b = (torch.randn(size, size, device=device).to(torch.float32 if is_cpu else dtype) for _ in range(2))
    is_double = is_cpu and dtype == torch.bfloat16 and _C.cpu_isa() in BF16_DOT
    return (2 if is_double else 1) * 2 * size**3 / clock(lambda: a @ b)
