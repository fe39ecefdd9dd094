"""The router's choice on CUDA. Legend: T tokens, E experts, K experts of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseline.compile.kernels.registry import Implementation
from fuseline.compile.kernels.triton.lines import line_sums
from fuseline.compile.ops import codes

TOPK_SOFTMAX = tl.constexpr(codes.ROUTE_TOPK_SOFTMAX)
ROWS = 4


def route_topk(logits: Tensor, k: int, order: int, renormalize: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weights[T, K] of `dtype`, ids[T, K] int64) of logits[T, E], the greatest first, equals by the lower id."""
    num_tokens, num_experts = logits.shape
    weights = logits.new_empty(num_tokens, k, dtype=dtype)
    ids = logits.new_empty(num_tokens, k, dtype=torch.int64)
    if num_tokens:
        route_kernel[(triton.cdiv(num_tokens, ROWS),)](
            weights, ids, logits, num_tokens, *logits.stride(), E=num_experts,
            PADDED_E=triton.next_power_of_2(num_experts), K=k, PADDED_K=triton.next_power_of_2(k), ROWS=ROWS,
            ORDER=order, IS_RENORMALIZED=bool(renormalize), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return weights, ids


@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    weights, ids, logits, num_tokens, stride_t, stride_e, E: tl.constexpr, PADDED_E: tl.constexpr, K: tl.constexpr,
    PADDED_K: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr, IS_RENORMALIZED: tl.constexpr,
):  # fmt: skip
    """Program ROWS tokens. Softmax in float32, rounded once."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    expert = tl.arange(0, PADDED_E)[None, :]
    place = tl.arange(0, PADDED_K)[None, :]
    there = (token < num_tokens) & (expert < E)
    x = tl.load(logits + token * stride_t + expert * stride_e, mask=there, other=float("-inf")).to(tl.float32)
    x = tl.where(token < num_tokens, x, 0.0)
    top = tl.max(x, 1)[:, None]
    mass = line_sums(tl.exp(x - tl.where(top == float("-inf"), 0.0, top)))[:, None]
    left = tl.where(expert < E, 1, 0) + tl.zeros([ROWS, PADDED_E], tl.int32)
    best = tl.full([ROWS, PADDED_K], float("-inf"), tl.float32)
    for k in tl.static_range(K):
        value = tl.max(tl.where(left > 0, x, float("-inf")), 1)[:, None]
        # A NaN is equal to nothing: the last expert then, so that no id lies outside.
        id = tl.min(tl.where((left > 0) & (x == value), expert, E - 1), 1)[:, None]
        left = tl.where(expert == id, 0, left)
        best = tl.where(place == k, value, best)
        tl.store(ids + token * K + k, id.to(tl.int64), mask=token < num_tokens)
    share = tl.exp(best - tl.where(top == float("-inf"), 0.0, top))
    if ORDER == TOPK_SOFTMAX:
        share = share / line_sums(share)[:, None]
    else:
        share = share / mass
        if IS_RENORMALIZED:
            share = share / line_sums(share)[:, None]
    tl.store(weights + token * K + place, share.to(weights.dtype.element_ty), mask=(token < num_tokens) & (place < K))


IMPLEMENTATIONS = (Implementation("route_topk", "triton.route_topk", "cuda", route_topk),)
