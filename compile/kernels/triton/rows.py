"""Rows picked by number on CUDA. Legend: T rows to pick from, R picked, D features."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fuseline.compile.kernels.registry import Implementation

BLOCK = 1024


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[T, D] -> its rows at indices rows[R]."""
    out = x.new_empty(rows.shape[0], x.shape[1])
    if out.numel():
        grid = (rows.shape[0], triton.cdiv(x.shape[1], BLOCK))
        gather_kernel[grid](out, x, rows, *x.stride(), D=x.shape[1], BLOCK=BLOCK)
    return out


@triton.jit
def gather_kernel(out, x, rows, x_stride_t, x_stride_d, D: tl.constexpr, BLOCK: tl.constexpr):
    """Program (picked row, BLOCK features)."""
    r = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = x + tl.load(rows + r).to(tl.int64) * x_stride_t
    tl.store(out + r * D + column, tl.load(line + column * x_stride_d, mask=column < D), mask=column < D)


IMPLEMENTATIONS = (Implementation("gather_rows", "triton.gather_rows", "cuda", gather_rows),)
