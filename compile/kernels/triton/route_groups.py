"""The choice of a router among groups on CUDA. Legend: T tokens, E experts, K experts of a token, G groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fuseline.compile.kernels.registry import Implementation
from fuseline.compile.kernels.triton.lines import line_sums
from fuseline.compile.ops import codes

SIGMOID = tl.constexpr(codes.ROUTE_SIGMOID)


def route_groups(
    logits: Tensor, bias: Tensor | None, k: int, score: int, num_groups: int, top_groups: int, group_best: int,
    renormalize: int, epsilon: float, scale: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(weights[T, K] of `dtype`, ids[T, K] int64) of logits[T, E], the greatest first, equals by the lower id."""
    num_tokens, num_experts = logits.shape
    weights = logits.new_empty(num_tokens, k, dtype=dtype)
    ids = logits.new_empty(num_tokens, k, dtype=torch.int64)
    if num_tokens:
        route_groups_kernel[(num_tokens,)](
            weights, ids, logits, bias, *logits.stride(), epsilon, scale, E=num_experts,
            PADDED_E=triton.next_power_of_2(num_experts), K=k, PADDED_K=triton.next_power_of_2(k), G=num_groups,
            PADDED_G=triton.next_power_of_2(num_groups), TOP_GROUPS=top_groups, GROUP_BEST=group_best, SCORE=score,
            IS_RENORMALIZED=bool(renormalize), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return weights, ids


@triton.jit
def route_groups_kernel(
    weights, ids, logits, bias, stride_t, stride_e, epsilon, scale, E: tl.constexpr, PADDED_E: tl.constexpr,
    K: tl.constexpr, PADDED_K: tl.constexpr, G: tl.constexpr, PADDED_G: tl.constexpr, TOP_GROUPS: tl.constexpr,
    GROUP_BEST: tl.constexpr, SCORE: tl.constexpr, IS_RENORMALIZED: tl.constexpr,
):  # fmt: skip
    """Program one token. Computed in float32, rounded once."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, PADDED_E)[None, :]
    place = tl.arange(0, PADDED_K)[None, :]
    is_expert = expert < E
    x = tl.load(logits + token * stride_t + expert * stride_e, mask=is_expert, other=float("-inf")).to(tl.float32)
    if SCORE == SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        shares = tl.exp(x - tl.max(x, 1)[:, None])
        scores = shares / line_sums(shares)[:, None]
    choice = scores
    if bias is not None:
        choice = scores + tl.load(bias + expert, mask=is_expert, other=0.0).to(tl.float32)
    choice = tl.where(is_expert, choice, float("-inf"))
    if G > 1:
        choice = _in_best_groups(choice, expert, E, PADDED_E, G, PADDED_G, TOP_GROUPS, GROUP_BEST)
    left = tl.where(is_expert, 1, 0)
    chosen = tl.zeros([1, PADDED_K], tl.float32)
    for k in tl.static_range(K):
        id = _best(choice, left, expert, E)
        left = tl.where(expert == id, 0, left)
        chosen = tl.where(place == k, _of(scores, expert == id), chosen)
        tl.store(ids + token * K + k + tl.zeros([1, 1], tl.int32), id.to(tl.int64))
    if IS_RENORMALIZED:
        chosen = chosen / (line_sums(chosen)[:, None] + epsilon)
    chosen = chosen * scale
    tl.store(weights + token * K + place, chosen.to(weights.dtype.element_ty), mask=place < K)


@triton.jit
def _of(x, is_it):
    """The number of a line at the one place, [1, 1]. No sum: that would have an order of the launch's."""
    return tl.max(tl.where(is_it, x, float("-inf")), 1)[:, None]


@triton.jit
def _best(x, left, at, LAST: tl.constexpr):
    """The first of the largest numbers of a line that are left, [1, 1]; the last place where none is a number."""
    largest = tl.max(tl.where(left > 0, x, float("-inf")), 1)[:, None]
    return tl.min(tl.where((left > 0) & (x == largest), at, LAST - 1), 1)[:, None]


@triton.jit
def _in_best_groups(
    choice, expert, E: tl.constexpr, PADDED_E: tl.constexpr, G: tl.constexpr, PADDED_G: tl.constexpr,
    TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr,
):  # fmt: skip
    """The choices [1, PADDED_E] with -inf for experts outside the best groups."""
    group = tl.arange(0, PADDED_G)[None, :]
    of_groups = tl.full([1, PADDED_G], float("-inf"), tl.float32)
    for g in tl.static_range(G):
        left = tl.where(expert // (E // G) == g, 1, 0)
        total = tl.zeros([1, 1], tl.float32)
        for _ in tl.static_range(GROUP_BEST):
            id = _best(choice, left, expert, E)
            left = tl.where(expert == id, 0, left)
            total += _of(choice, expert == id)
        of_groups = tl.where(group == g, total, of_groups)
    left = tl.where(group < G, 1, 0)
    is_kept = tl.zeros([1, PADDED_E], tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        id = _best(of_groups, left, group, G)
        left = tl.where(group == id, 0, left)
        is_kept = tl.where(expert // (E // G) == id, 1, is_kept)
    return tl.where((is_kept > 0) & (expert < E), choice, float("-inf"))


IMPLEMENTATIONS = (Implementation("route_groups", "triton.route_groups", "cuda", route_groups),)
