"""Inputs quantized to e4m3 and products of e4m3 numbers, on GPUs that have them (sm_89 and later).

The largest magnitude of a row has no order, so a row's codes depend on that row alone. Legend: M rows, N outputs,
K inputs, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseline.compile.kernels.registry import Implementation, tunings
from fuseline.compile.kernels.triton.lines import Lines, lined, place_of, rounded
from fuseline.compile.kernels.triton.matmul import GROUP as TILES_TOGETHER
from fuseline.compile.kernels.triton.matmul import grid
from fuseline.compile.kernels.triton.norm import WIDEST, normalized, supports
from fuseline.compile.kernels.triton.rope_kernels import fp8_bits
from fuseline.compile.kernels.triton.tile import Tile
from fuseline.compile.kernels.triton.tiles import grouped
from fuseline.compile.ops.fp8 import E4M3

ISAS = ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
FEW_ROWS = 16
LOW, HIGH = Tile(16, 64, 128, 4, 4), Tile(64, 128, 128, 8, 4)
TILES = (Tile(16, 32, 128, 4, 5), Tile(32, 64, 128, 4, 4), Tile(128, 128, 128, 8, 3))
"""Candidates beside LOW and HIGH."""


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[..., K] -> (codes e4m3, scales [..., 1] float32)."""
    return _quantized(x, None, None, 0.0, None)[:2]


def rms_norm_fp8(x: Tensor, weight: Tensor | None, eps: float, mode: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a norm's rows, in one pass."""
    return _quantized(x, None, weight, eps, mode)[:2]


def add_rms_norm_fp8(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, mode: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of x + residual, and that sum."""
    return _quantized(x, residual, weight, eps, mode)


def _quantized(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, mode: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scales, sum); `mode` None: without a norm."""
    codes, scales = x.new_empty(x.shape, dtype=E4M3), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    total = None if residual is None else x.new_empty(x.shape)
    if not x.numel():
        return codes, scales, total
    out = codes.view(torch.uint8)
    _, x, other = lined(out, x, x if residual is None else residual)
    lines = Lines.of(out, x, other)
    dim = x.shape[-1]
    block = triton.next_power_of_2(dim)
    quantize_kernel[(lines.num_lines,)](
        out, scales, x, None if residual is None else other, total, weight, lines.inner, *lines.strides, eps,
        D=dim, BLOCK=block, MODE=mode, num_warps=min(16, max(4, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scales, total


@triton.jit(do_not_specialize=["inner"])
def quantize_kernel(
    codes, scales, x, residual, total, weight, inner, out_outer, out_inner, x_outer, x_inner, y_outer, y_inner, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Program: a row, normalized as the kernels of norm.py do and rounded to its dtype, then quantized."""
    line = tl.program_id(0) + tl.arange(0, 1)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    there = column < D
    at = place_of(line, inner, out_outer, out_inner) + column
    dtype: tl.constexpr = x.dtype.element_ty
    wide = tl.load(x + place_of(line, inner, x_outer, x_inner) + column, mask=there, other=0.0).to(tl.float32)
    if residual is not None:
        other = tl.load(residual + place_of(line, inner, y_outer, y_inner) + column, mask=there, other=0.0)
        wide = rounded(wide + other.to(tl.float32), dtype)
        tl.store(total + at, wide.to(dtype), mask=there)
    if MODE is not None:
        wide = rounded(normalized(wide, weight, None, column, eps, dtype, D, MODE), dtype)
    largest = tl.max(tl.abs(wide), 1)[:, None]
    scale = tl.where(largest > 0.0, tl.div_rn(largest, tl.full([1, 1], 448.0, tl.float32)), 1.0)
    tl.store(scales + line, scale)
    bits = fp8_bits(tl.div_rn(wide, tl.broadcast_to(scale, [1, BLOCK])), 7, 3, 448.0)
    tl.store(codes + at, bits, mask=there)


def linear_fp8(
    x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype, *,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """x[..., K] e4m3 times a weight of e4m3 codes [N, W] -> [..., N]; float32 sums, those of a group scaled as one."""
    num_out, num_in = codes.shape[0], x.shape[-1]
    out = x.new_empty(*x.shape[:-1], num_out, dtype=dtype)
    if out.numel() == 0:
        return out
    rows = x.reshape(-1, num_in)
    tile = tile or (LOW if rows.shape[0] <= FEW_ROWS else HIGH)
    fp8_kernel[grid(rows, num_out, tile)](
        out, rows, x_scales, codes.view(E4M3), scales, bias, rows.shape[0], num_in, codes.stride(0) * 4,
        scales.stride(0), N=num_out, K=num_in, GROUP=group, TOGETHER=TILES_TOGETHER, **tile.constants(),
    )  # fmt: skip
    return out


def linear_fp8_invariant(
    x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype
) -> Tensor:
    """`linear_fp8` with one tile for any number of rows."""
    return linear_fp8(x, x_scales, codes, scales, bias, group, dtype, tile=HIGH)


@triton.jit(do_not_specialize=["num_rows"])
def fp8_kernel(
    out, x, x_scales, codes, scales, bias, num_rows, x_stride, code_stride, scale_stride, N: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Program: every num_programs-th tile."""
    across = tl.cdiv(N, COLUMNS)
    down = tl.cdiv(num_rows, ROWS)
    for tile in range(tl.program_id(0), across * down, tl.num_programs(0)):
        of_rows, of_columns = grouped(tile, down, across, TOGETHER)
        row = of_rows * ROWS + tl.arange(0, ROWS)
        column = of_columns * COLUMNS + tl.arange(0, COLUMNS)
        is_row, is_column = row < num_rows, column < N
        a_line = x + row.to(tl.int64)[:, None] * x_stride
        w_line = codes + column.to(tl.int64)[None, :] * code_stride
        y = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, K, DEPTH):
            k = first + tl.arange(0, DEPTH)
            is_input = is_row[:, None] if K % DEPTH == 0 else is_row[:, None] & (k < K)[None, :]
            is_weight = is_column[None, :] if K % DEPTH == 0 else is_column[None, :] & (k < K)[:, None]
            a = tl.load(a_line + k[None, :], mask=is_input, other=0.0)
            w = tl.load(w_line + k[:, None], mask=is_weight, other=0.0)
            # Matrix instructions add fp8 products with fewer bits than float32 has: a step's sum is added as float32.
            part = tl.dot(a, w)
            if GROUP > 0:
                at = first // GROUP * scale_stride + column
                part *= tl.load(scales + at, mask=is_column, other=0.0).to(tl.float32)[None, :]
            y += part
        if GROUP == 0:
            y *= tl.load(scales + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        y *= tl.load(x_scales + row, mask=is_row, other=0.0)[:, None]
        if bias is not None:
            y += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        to = out + row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def _fits(x: Tensor, *_: object) -> bool:
    return x.shape[-1] <= WIDEST


IMPLEMENTATIONS = (
    Implementation("quantize_fp8", "triton.quantize_fp8", "cuda", quantize_fp8, supports=_fits),
    Implementation("rms_norm_fp8", "triton.rms_norm_fp8", "cuda", rms_norm_fp8, supports=supports),
    Implementation("add_rms_norm_fp8", "triton.add_rms_norm_fp8", "cuda", add_rms_norm_fp8, supports=supports),
    Implementation("linear_fp8", "triton.linear_fp8", "cuda", linear_fp8, isas=ISAS, tunings=tunings("tile", TILES)),
    Implementation("linear_fp8_invariant", "triton.linear_fp8_invariant", "cuda", linear_fp8_invariant, isas=ISAS),
)
