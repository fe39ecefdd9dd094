"""Linears of few rows on CUDA: the weights' way through memory is all the work, so it is one pass over them.

Rows are worked on sixteen at a time, whatever their number, and each output is summed by one program in one order: a
row's bits do not depend on the others'. More rows are a matrix product proper and go to cuBLASLt.

Legend: M rows, N outputs, K inputs, I = N / 2 where gate and up are one product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fuseline.compile.kernels.registry import LAST, Implementation, tunings
from fuseline.compile.kernels.triton import activation
from fuseline.compile.kernels.triton.activation import activate
from fuseline.compile.kernels.triton.lines import rounded

ROWS = 16  # of a matrix instruction
FILLING = 2048  # smallest number of outputs with a program for every multiprocessor of a GPU
WIDE = 8192  # outputs from which on a program takes 32 of them


@dataclass(frozen=True)
class Tuning:
    """Launch parameters. An output's sum runs over k in one order for all of them."""

    columns: int
    """Outputs of a program."""
    depth: int
    """Bytes of k that a step of its loop loads of a row."""
    num_warps: int
    num_stages: int

    @staticmethod
    def of(num_out: int, act: int | None) -> Tuning:
        return Tuning(32 if num_out >= WIDE and act is None else 16, 1024, 4, 3)

    def __str__(self) -> str:
        return f"{self.columns}x{self.depth} {self.num_warps}w {self.num_stages}s"


TUNINGS = (Tuning(16, 512, 4, 5), Tuning(32, 512, 4, 5), Tuning(64, 256, 4, 5), Tuning(16, 1024, 8, 3))
"""Measured by -O3 beside what a launch chooses itself."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, tuning: Tuning | None = None) -> Tensor:
    """x[..., K] times weight[N, K] -> [..., N]; float32 accumulation, the bias added before the one rounding."""
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    _launch(out, x, weight, bias, None, tuning)
    return out


def linear_act_mul(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: int, *, tuning: Tuning | None = None
) -> Tensor:  # fmt: skip
    """act(gate) * up of a joined product with weight [2I, K], gate above up -> [..., I]; rounded as the three ops."""
    out = x.new_empty(*x.shape[:-1], weight.shape[0] // 2)
    _launch(out, x, weight, bias, act, tuning)
    return out


def _launch(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act: int | None, tuning: Tuning | None
) -> None:  # fmt: skip
    x = x.reshape(-1, x.shape[-1])
    num_out, num_in = out.shape[-1], x.shape[-1]
    if out.numel() == 0:
        return
    tuning = tuning or Tuning.of(num_out, act)
    grid = (triton.cdiv(num_out, tuning.columns), triton.cdiv(x.shape[0], ROWS))
    few_rows_kernel[grid](
        out, x, weight, bias, x.shape[0], *x.stride(), *weight.stride(), N=num_out, K=num_in, ACT=act, ROWS=ROWS,
        COLUMNS=tuning.columns, DEPTH=tuning.depth // x.element_size(), num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def few_rows_kernel(
    out, x, weight, bias, num_rows, x_stride_m, x_stride_k, stride_n, stride_k, N: tl.constexpr, K: tl.constexpr,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (COLUMNS outputs, ROWS rows). With ACT the outputs' gates are rows n of the weight, their ups N + n."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    line = weight + column.to(tl.int64)[None, :] * stride_n
    up_line = weight + (column.to(tl.int64) + N)[None, :] * stride_n
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, K, DEPTH):
        k = first + tl.arange(0, DEPTH)
        a = tl.load(x + row.to(tl.int64)[:, None] * x_stride_m + k[None, :] * x_stride_k,
                    mask=(row < num_rows)[:, None] & (k < K)[None, :], other=0.0)  # fmt: skip
        there = (k < K)[:, None] & (column < N)[None, :]
        w = tl.load(line + k[:, None] * stride_k, mask=there, other=0.0)
        y = tl.dot(a, w, y, input_precision="ieee")
        if ACT is not None:
            w = tl.load(up_line + k[:, None] * stride_k, mask=there, other=0.0)
            up = tl.dot(a, w, up, input_precision="ieee")
    dtype: tl.constexpr = out.dtype.element_ty
    if bias is not None:
        y += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        if ACT is not None:
            up += tl.load(bias + N + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if ACT is not None:
        y = rounded(activate(rounded(y, dtype), ACT), dtype) * rounded(up, dtype)
    to = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(to, y.to(dtype), mask=(row < num_rows)[:, None] & (column < N)[None, :])


def linear_then_act_mul(x: Tensor, weight: Tensor, bias: Tensor | None, act: int) -> Tensor:
    """cuBLASLt's product and the activation on its own."""
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    return activation.act_mul(gate, up, act)


def _is_wide(x: Tensor, weight: Tensor, *_: object) -> bool:
    return _is_one(x, weight) and weight.shape[0] >= FILLING


def _is_narrow(x: Tensor, weight: Tensor, *_: object) -> bool:
    return _is_one(x, weight) and weight.shape[0] < FILLING


def _is_one(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and x.dtype.is_floating_point


FEW = {"max_rows": ROWS, "tunings": tunings("tuning", TUNINGS)}
IMPLEMENTATIONS = (
    Implementation("linear", "triton.linear", "cuda", linear, supports=_is_wide, **FEW),
    # Behind torch's where it leaves a part of the GPU idle.
    Implementation("linear", "triton.linear", "cuda", linear, supports=_is_narrow, order=LAST, **FEW),
    Implementation("linear_act_mul", "triton.linear_act_mul", "cuda", linear_act_mul, **FEW),
    Implementation("linear_act_mul", "torch.linear, triton.act_mul", "cuda", linear_then_act_mul),
)
