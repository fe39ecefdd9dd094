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
LINE = 2048  # features that a program of few features a line fills itself with
WIDEST = 32768
WARPS_TO_TRY = (4, 8, 16)
"""Warps of a program that -O3 measures beside the default."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, mode: int, *, num_warps: int = 0) -> Tensor:
    """`num_warps` of a program, also below; 0: chosen."""
    return _rms(x, None, weight, eps, mode, num_warps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, mode: int, *, num_warps: int = 0
) -> tuple[Tensor, Tensor]:
    return _rms(x, residual, weight, eps, mode, num_warps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, num_warps: int = 0) -> Tensor:
    return _layer(x, None, weight, bias, eps, num_warps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, num_warps: int = 0
) -> tuple[Tensor, Tensor]:
    return _layer(x, residual, weight, bias, eps, num_warps)


def supports(x: Tensor, *_: object) -> bool:
    return x.shape[-1] <= WIDEST


def _rms(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, mode: int, num_warps: int
) -> tuple[Tensor, Tensor]:
    tensors, lines, options = _launch(x, residual, num_warps)
    if lines.num_lines:
        grid = (triton.cdiv(lines.num_lines, options["ROWS"]),)
        rms_norm_kernel[grid](*tensors, weight, lines.num_lines, lines.inner, *lines.strides, eps, MODE=mode, **options)
    return tensors[0], tensors[1]


def _layer(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, num_warps: int
) -> tuple[Tensor, Tensor]:
    tensors, lines, options = _launch(x, residual, num_warps)
    if lines.num_lines:
        grid = (triton.cdiv(lines.num_lines, options["ROWS"]),)
        layer_norm_kernel[grid](
            *tensors, weight, bias, lines.num_lines, lines.inner, *lines.strides, eps, **options
        )  # fmt: skip
    return tensors[0], tensors[1]


def _launch(
    x: Tensor, residual: Tensor | None, num_warps: int
) -> tuple[tuple[Tensor | None, ...], Lines, dict[str, int]]:
    """(out, total, x, residual), their row strides, and the sizes of a program."""
    if not supports(x):
        raise ValueError(f"a norm over {x.shape[-1]} features; at most {WIDEST} are held at once")
    x, other = lined(x, x if residual is None else residual)
    out = torch.empty_like(x)
    if len({t.stride() for t in (out, x, other)}) > 1:
        x, other, out = *lined(out, x, other)[1:], out
    total = None if residual is None else torch.empty_like(out)
    dim = x.shape[-1]
    block = triton.next_power_of_2(dim)
    rows = max(1, min(16, LINE // block))
    num_warps = num_warps or min(16, max(4, block // 512))
    options = {"D": dim, "BLOCK": block, "ROWS": rows, "num_warps": num_warps, "enable_fp_fusion": False}
    return (out, total, x, None if residual is None else other), Lines.of(out, x, other), options


@triton.jit
def _sum(total, x, residual, line, inner, out_outer, out_inner, x_outer, x_inner, y_outer, y_inner, there, column):
    """The line to norm, float32: x, or x + residual as its dtype holds it, which is stored."""
    wide = tl.load(x + place_of(line, inner, x_outer, x_inner) + column, mask=there, other=0.0).to(tl.float32)
    if residual is not None:
        other = tl.load(residual + place_of(line, inner, y_outer, y_inner) + column, mask=there, other=0.0)
        wide = rounded(wide + other.to(tl.float32), total.dtype.element_ty)
        at = place_of(line, inner, out_outer, out_inner) + column
        tl.store(total + at, wide.to(total.dtype.element_ty), mask=there)
    return wide


@triton.jit(do_not_specialize=["num_lines", "inner"])
def rms_norm_kernel(
    out, total, x, residual, weight, num_lines, inner, out_outer, out_inner, x_outer, x_inner, y_outer, y_inner, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Each program normalizes ROWS rows."""
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    there = (line < num_lines) & (column < D)
    wide = _sum(
        total, x, residual, line, inner, out_outer, out_inner, x_outer, x_inner, y_outer, y_inner, there, column
    )
    wide = wide * tl.rsqrt(line_sums(wide * wide) / D + eps)[:, None]
    if weight is not None:
        scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        if MODE == CAST_THEN_SCALE:
            wide = rounded(wide, out.dtype.element_ty)
        if MODE == ONE_PLUS:
            scale = scale + 1.0
        wide = wide * scale
    at = place_of(line, inner, out_outer, out_inner) + column
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_lines", "inner"])
def layer_norm_kernel(
    out, total, x, residual, weight, bias, num_lines, inner, out_outer, out_inner, x_outer, x_inner, y_outer, y_inner,
    eps, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each program normalizes ROWS rows; the variance is that of the differences from the mean."""
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    there = (line < num_lines) & (column < D)
    wide = _sum(
        total, x, residual, line, inner, out_outer, out_inner, x_outer, x_inner, y_outer, y_inner, there, column
    )
    wide = tl.where(column < D, wide - (line_sums(wide) / D)[:, None], 0.0)
    wide = wide * tl.rsqrt(line_sums(wide * wide) / D + eps)[:, None]
    if weight is not None:
        wide = wide * tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    if bias is not None:
        wide = wide + tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
    at = place_of(line, inner, out_outer, out_inner) + column
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=there)


IMPLEMENTATIONS = tuple(
    Implementation(
        run.__name__, f"triton.{run.__name__}", "cuda", run, supports=supports,
        tunings=tunings("num_warps", WARPS_TO_TRY, "w"),
    )
    for run in (rms_norm, add_rms_norm, layer_norm, add_layer_norm)
)  # fmt: skip
