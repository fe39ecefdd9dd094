"""Norms on CUDA, with the residual's sum where it comes first. Legend: D features; the dims before it are rows.

A line is read once and summed in one order, whatever the batch, its strides and the warps; a product and a sum are not
fused, which would happen where a pair is one thread's and not elsewhere. Rounding as in compile/ops/norm.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseline.compile.kernels.registry import Implementation, tunings
from fuseline.compile.kernels.triton.lines import Lines, line_sums, lined, place_of, rounded
from fuseline.compile.ops import codes

CAST_THEN_SCALE = tl.constexpr(codes.NORM_CAST_THEN_SCALE)
ONE_PLUS = tl.constexpr(codes.NORM_ONE_PLUS)
LAYER = tl.constexpr(-1)  # the mode of a LayerNorm
LINE = 2048  # features that a program of few features a line fills itself with
WIDEST = 32768
WARPS_TO_TRY = (4, 8, 16)
"""Warps of a program that -O3 measures beside the default."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, mode: int, *, num_warps: int = 0) -> Tensor:
    """`num_warps` of a program, also below; 0: chosen."""
    return _norm(x, None, weight, None, eps, mode, num_warps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, mode: int, *, num_warps: int = 0
) -> tuple[Tensor, Tensor]:
    return _norm(x, residual, weight, None, eps, mode, num_warps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, num_warps: int = 0) -> Tensor:
    return _norm(x, None, weight, bias, eps, LAYER.value, num_warps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, num_warps: int = 0
) -> tuple[Tensor, Tensor]:
    return _norm(x, residual, weight, bias, eps, LAYER.value, num_warps)


def supports(x: Tensor, *_: object) -> bool:
    return x.shape[-1] <= WIDEST


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, mode: int,
    num_warps: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(norm, sum)."""
    if not supports(x):
        raise ValueError(f"a norm over {x.shape[-1]} features; at most {WIDEST} are held at once")
    x, other = lined(x, x if residual is None else residual)
    out = torch.empty_like(x)
    if len({t.stride() for t in (out, x, other)}) > 1:
        x, other, out = *lined(out, x, other)[1:], out
    total = None if residual is None else torch.empty_like(out)
    lines, dim = Lines.of(out, x, other), x.shape[-1]
    block = triton.next_power_of_2(dim)
    rows = max(1, min(16, LINE // block))
    if lines.num_lines:
        norm_kernel[(triton.cdiv(lines.num_lines, rows),)](
            out, total, x, None if residual is None else other, weight, bias, lines.num_lines, lines.inner,
            *lines.strides, eps, D=dim, BLOCK=block, ROWS=rows, MODE=mode,
            num_warps=num_warps or min(16, max(4, block // 512)), enable_fp_fusion=False,
        )  # fmt: skip
    return out, total


@triton.jit(do_not_specialize=["num_lines", "inner"])
def norm_kernel(
    out, total, x, residual, weight, bias, num_lines, inner, out_outer, out_inner, x_outer, x_inner, y_outer, y_inner,
    eps, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Each program normalizes ROWS rows: x, or x + residual as its dtype holds it, which is stored. A LayerNorm's
    variance is that of the differences from the mean."""
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    there = (line < num_lines) & (column < D)
    at = place_of(line, inner, out_outer, out_inner) + column
    wide = tl.load(x + place_of(line, inner, x_outer, x_inner) + column, mask=there, other=0.0).to(tl.float32)
    if residual is not None:
        other = tl.load(residual + place_of(line, inner, y_outer, y_inner) + column, mask=there, other=0.0)
        wide = rounded(wide + other.to(tl.float32), total.dtype.element_ty)
        tl.store(total + at, wide.to(total.dtype.element_ty), mask=there)
    wide = normalized(wide, weight, bias, column, eps, out.dtype.element_ty, D, MODE)
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=there)


@triton.jit
def normalized(wide, weight, bias, column, eps, dtype: tl.constexpr, D: tl.constexpr, MODE: tl.constexpr):
    """Rows of float32, of which columns from D on are 0, over their size, times the weight; rounded within to dtype."""
    if MODE == LAYER:
        wide = tl.where(column < D, wide - (line_sums(wide) / D)[:, None], 0.0)
    wide = wide * tl.rsqrt(line_sums(wide * wide) / D + eps)[:, None]
    if weight is not None:
        scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        if MODE == CAST_THEN_SCALE:
            wide = rounded(wide, dtype)
        if MODE == ONE_PLUS:
            scale = scale + 1.0
        wide = wide * scale
    if bias is not None:
        wide = wide + tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
    return wide


IMPLEMENTATIONS = tuple(
    Implementation(
        run.__name__, f"triton.{run.__name__}", "cuda", run, supports=supports,
        tunings=tunings("num_warps", WARPS_TO_TRY, "w"),
    )
    for run in (rms_norm, add_rms_norm, layer_norm, add_layer_norm)
)  # fmt: skip
