"""Gated activations on CUDA. Legend: I features; the dims before it are rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseline.compile.kernels.registry import Implementation
from fuseline.compile.kernels.triton.lines import Lines, lined, place_of, rounded
from fuseline.compile.ops import codes

SILU, RELU = tl.constexpr(codes.UNARY["silu"]), tl.constexpr(codes.UNARY["relu"])
GELU, GELU_TANH = tl.constexpr(codes.UNARY["gelu"]), tl.constexpr(codes.UNARY["gelu_tanh"])
BLOCK = 1024


def act_mul(gate: Tensor, up: Tensor, act: int) -> Tensor:
    """act(gate) * up of one shape [..., I]; act(gate) is rounded to the dtype first."""
    gate, up = lined(gate, up)
    out = torch.empty_like(gate)
    if out.stride() != gate.stride():
        out, gate, up = lined(out, gate, up)
    lines, dim = Lines.of(out, gate, up), gate.shape[-1]
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(dim))
        rows = BLOCK // block
        grid = (triton.cdiv(lines.num_lines, rows), triton.cdiv(dim, block))
        act_mul_kernel[grid](
            out, gate, up, lines.num_lines, lines.inner, *lines.strides, D=dim, BLOCK=block, ROWS=rows, ACT=act
        )
    return out


@triton.jit(do_not_specialize=["num_lines", "inner"])
def act_mul_kernel(
    out, gate, up, num_lines, inner, out_outer, out_inner, gate_outer, gate_inner, up_outer, up_inner, D: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Program (ROWS rows, BLOCK features)."""
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = (line < num_lines) & (column < D)
    g = tl.load(gate + place_of(line, inner, gate_outer, gate_inner) + column, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + place_of(line, inner, up_outer, up_inner) + column, mask=there, other=0.0).to(tl.float32)
    y = rounded(activate(g, ACT), out.dtype.element_ty) * u
    tl.store(out + place_of(line, inner, out_outer, out_inner) + column, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """float32 -> float32; ACT one of the codes in `ACTIVATIONS` of compile/ops/activation.py."""
    if ACT == SILU:
        return x * sigmoid(x)
    elif ACT == GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == GELU_TANH:
        # 0.5 (1 + tanh z) is the sigmoid of 2 z.
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACT == RELU)
        return tl.maximum(x, 0.0)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


IMPLEMENTATIONS = (Implementation("act_mul", "triton.act_mul", "cuda", act_mul),)
