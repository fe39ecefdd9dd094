"""A product of each head with its own weight on CUDA, each row summed in the same order whatever the number of rows.

Legend: H heads, T tokens, K inputs, N outputs of a head.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fuseline.compile.kernels.registry import Implementation

ROWS, COLUMNS = 32, 64
DEPTH_BYTES = 128  # of k in a step


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x[1, H, T, K] times the weight[H, N, K] of each head -> [1, T, H, N]; float32 accumulation, one rounding."""
    _, num_heads, num_tokens, num_in = x.shape
    num_out = weight.shape[1]
    out = x.new_empty(1, num_tokens, num_heads, num_out)
    if out.numel() == 0:
        return out
    x = x if x.stride(3) == 1 else x.contiguous()
    head_linear_kernel[(triton.cdiv(num_out, COLUMNS), triton.cdiv(num_tokens, ROWS), num_heads)](
        out, x, weight, num_tokens, x.stride(1), x.stride(2), *weight.stride(), H=num_heads, N=num_out, K=num_in,
        ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH_BYTES // x.element_size(), num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_tokens"])
def head_linear_kernel(
    out, x, weight, num_tokens, x_stride_h, x_stride_t, stride_h, stride_n, stride_k, H: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (COLUMNS outputs, ROWS tokens, head)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    is_row, is_column = token < num_tokens, column < N
    lines = x + head * x_stride_h + token[:, None] * x_stride_t
    of_weight = weight + head * stride_h + column[None, :] * stride_n
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, K, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        a = tl.load(lines + k[None, :], mask=is_row[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(of_weight + k[:, None] * stride_k, mask=is_column[None, :] & (k < K)[:, None], other=0.0)
        y = tl.dot(a, w, y, input_precision="ieee")
    to = out + (token[:, None] * H + head) * N + column[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def _is_alike(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and x.dtype.is_floating_point


IMPLEMENTATIONS = (Implementation("head_linear", "triton.head_linear", "cuda", head_linear, supports=_is_alike),)
