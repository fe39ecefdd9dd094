"""Linears of any number of rows on CUDA, each row summed in the same order whatever their number.

A tile of the result is one program's work, its sum over k one loop; tiles are chosen by the weight's shape alone, so a
row's bits depend on no other row and on no batch. Programs are as many as fill the GPU, and take tiles in turn; tiles
that follow each other share rows of the weight while the second-level cache still holds them.

Legend: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseline.compile.kernels.registry import LAST, Implementation, tunings
from fuseline.compile.kernels.triton.tile import Tile
from fuseline.compile.kernels.triton.tiles import grouped

GROUP = 8  # tiles of rows that go over the outputs together
INTERPRETED = 3  # programs where there is no GPU


TILES = (Tile(64, 256, 64, 4, 3), Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3))
"""Half-precision tiles for many rows: candidates beside default_tile."""


def default_tile(num_out: int, item_size: int) -> Tile:
    """Low, because a single row pays for all of its tile, and narrow enough to keep a GPU busy."""
    columns = 128 if num_out >= 8192 else 64
    return Tile(64, columns, 64, 4, 4) if item_size == 2 else Tile(32, 64, 32, 4, 3)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, tile: Tile | None = None) -> Tensor:
    """x[..., K] times weight[N, K] -> [..., N]; float32 accumulation, the bias added before the one rounding."""
    num_out, num_in = weight.shape
    out = x.new_empty(*x.shape[:-1], num_out)
    if out.numel() == 0:
        return out
    rows, stride = rows_of(x)
    tile = tile or default_tile(num_out, x.element_size())
    matmul_kernel[grid(rows, num_out, tile)](
        out, rows, weight, bias, rows.shape[0], stride, *weight.stride(), N=num_out, K=num_in, GROUP=GROUP,
        **tile.constants(),
    )  # fmt: skip
    return out


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x[..., K] as rows whose inputs are neighbours, and the stride of rows."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    # The stride of a single row may be any number; a kernel compiled for another kind of number would hold up a step.
    return rows, rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def grid(rows: Tensor, num_out: int, tile: Tile) -> tuple[int]:
    """Programs for a product of rows [M, K] with N outputs, each of which takes every num_programs-th tile."""
    num_tiles = triton.cdiv(rows.shape[0], tile.rows) * triton.cdiv(num_out, tile.columns)
    return (min(num_tiles, num_programs(rows.device)),)


@cache
def num_programs(device: torch.device) -> int:
    """Two a processor: one loads while the other multiplies."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED


@triton.jit(do_not_specialize=["num_rows"])
def matmul_kernel(
    out, x, weight, bias, num_rows, x_stride_m, stride_n, stride_k, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program: every num_programs-th tile."""
    across = tl.cdiv(N, COLUMNS)
    down = tl.cdiv(num_rows, ROWS)
    for tile in range(tl.program_id(0), across * down, tl.num_programs(0)):
        of_rows, of_columns = grouped(tile, down, across, GROUP)
        row = of_rows * ROWS + tl.arange(0, ROWS)
        column = of_columns * COLUMNS + tl.arange(0, COLUMNS)
        is_row, is_column = row < num_rows, column < N
        a_line = x + row.to(tl.int64)[:, None] * x_stride_m
        w_line = weight + column.to(tl.int64)[None, :] * stride_n
        y = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, K, DEPTH):
            k = begin + tl.arange(0, DEPTH)
            if K % DEPTH == 0:
                a = tl.load(a_line + k[None, :], mask=is_row[:, None], other=0.0)
                w = tl.load(w_line + k[:, None] * stride_k, mask=is_column[None, :], other=0.0)
            else:
                a = tl.load(a_line + k[None, :], mask=is_row[:, None] & (k < K)[None, :], other=0.0)
                w = tl.load(w_line + k[:, None] * stride_k, mask=is_column[None, :] & (k < K)[:, None], other=0.0)
            y = tl.dot(a, w, y, input_precision="ieee")
        if bias is not None:
            y += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        to = out + row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def _is_half(x: Tensor, weight: Tensor, *_: object) -> bool:
    return x.dtype == weight.dtype and x.dtype.is_floating_point and x.dtype.itemsize == 2


IMPLEMENTATIONS = (
    Implementation(
        "linear", "triton.matmul", "cuda", matmul, supports=_is_half, order=LAST + 1,
        tunings=tunings("tile", TILES),
    ),
    Implementation("linear_invariant", "triton.linear_invariant", "cuda", matmul),
)  # fmt: skip
