"""Router that chooses experts among the best groups (DeepSeek-V2, V3). Legend: T tokens, K of E experts, G groups."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fuseline.compile.ops import codes
from fuseline.compile.ops.library import Make, ModelShape, Workload, op


def route_groups_inputs(make: Make) -> Iterator[tuple]:
    """Scores far enough apart that no dtype's rounding makes them equal, so that their order is unique."""
    logits = torch.stack([make.order(12) for _ in range(9)]).to(make.dtype) / 4
    bias = make.order(12).to(make.dtype) / 64
    sigmoid, softmax = codes.ROUTE_SIGMOID, codes.ROUTE_SOFTMAX
    for score, *groups, renormalize, epsilon in (
        (sigmoid, 3, 2, 2, 1, 1e-20), (sigmoid, 1, 1, 1, 0, 0.0), (softmax, 4, 2, 1, 1, 0.0),
        (softmax, 3, 1, 3, 0, 0.0),
    ):  # fmt: skip
        for shift in (None, bias):
            yield logits, shift, 3, score, *groups, renormalize, epsilon, 2.5, make.dtype


def route_groups_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """The 256 experts of DeepSeek-V3 in 8 groups."""
    for tokens in make.tokens:
        args = (make.normal(tokens, 256), make.normal(256), 8, codes.ROUTE_SIGMOID, 8, 4, 2, 1, 1e-20, 2.5, make.dtype)
        yield Workload(f"{tokens} x 8 of 256", args)


@op(
    fake=lambda logits, bias, k, score, num_groups, top_groups, group_best, renormalize, epsilon, scale, dtype: (
        logits.new_empty(logits.shape[0], k, dtype=dtype),
        logits.new_empty(logits.shape[0], k, dtype=torch.int64),
    ),
    inputs=route_groups_inputs,
    tolerance=4.0,
    workloads=route_groups_workloads,
)
def route_groups(
    logits: Tensor, bias: Tensor | None, k: int, score: int, num_groups: int, top_groups: int, group_best: int,
    renormalize: int, epsilon: float, scale: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns (weights[T, K] of `dtype`, ids[T, K]) for logits[T, E] and bias[E], computed in fp32, rounded once.

    Experts are chosen by score plus bias in the `top_groups` groups whose `group_best` best experts have the greatest
    sum, and weighted by score: over their sum plus epsilon if they are renormalized, times `scale`.
    """
    wide = logits.float()
    scores = wide.sigmoid() if score == codes.ROUTE_SIGMOID else wide.softmax(-1)
    choice = scores if bias is None else scores + bias.float()
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        best = grouped.topk(group_best, -1).values.sum(-1).topk(top_groups, -1).indices
        is_kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, best, True)
        choice = grouped.masked_fill(~is_kept[..., None], float("-inf")).flatten(1)
    ids = choice.topk(k, -1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + epsilon)
    return (weights * scale).to(dtype), ids
