"""Experts whose weights are codes of 4 or 8 bits, stored as those of linear_codes with a leading dim.

Legend: T tokens, K experts per token, E experts, D features, I hidden size of an expert, P panels, W words, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fuseline.compile.ops import codes
from fuseline.compile.ops.coded import KINDS
from fuseline.compile.ops.library import Make, ModelShape, Workload, op
from fuseline.compile.ops.linear_codes import PANEL, linear_codes, num_words, random_weight
from fuseline.compile.ops.moe import gated, sum_of_experts

WEIGHTS = (
    "gate_up", "gate_up_scales", "gate_up_zeros", "gate_up_order", "down", "down_scales", "down_zeros", "down_order",
    "gate_up_bias", "down_bias",
)  # fmt: skip


def random_experts(make: Make, kind: str, group: int, num_out: int, num_in: int, has_zeros: bool) -> tuple:
    """(codes, scales, zeros, order) of 4 experts; int4 with zeros has an order."""
    parts = zip(*(random_weight(make, kind, group, num_out, num_in, has_zeros) for _ in range(4)), strict=True)
    order = torch.stack([make.order(num_in) for _ in range(4)]) if kind == "int4" and has_zeros else None
    return *(None if part[0] is None else torch.stack(part) for part in parts), order


def experts_codes_inputs(make: Make) -> Iterator[tuple]:
    """4 experts, 2 per token; every kind, few and many tokens, gate_up and down of two layouts; D = 72, I = 40.

    A token's weights add up to 1, as a router's do: a rounding of an expert's output is then one of the sum at most.
    """
    silu, oss = codes.EXPERT_ACTS["silu"], codes.EXPERT_ACTS["glu_oss"]
    for first, second, tokens, act in (
        (("e2m1", 32, False), ("e2m1", 32, False), 7, oss), (("e2m1", 32, False), ("e2m1", 32, False), 70, oss),
        (("int4", 32, True), ("int4", 8, True), 7, silu), (("int4", 0, False), ("int8", 0, False), 1, silu),
        (("int4", 64, True), ("int4", 32, True), 90, silu), (("int8", 32, True), ("int8", 0, True), 80, silu),
        (("fp8", 64, False), ("fp8", 0, False), 60, silu), (("fp8", 0, False), ("nf4", 8, False), 3, silu),
        (("fp4", 8, False), ("fp8", 8, False), 5, codes.EXPERT_ACTS["gelu"]),
        (("int5", 32, False), ("uint5", 32, True), 6, silu), (("uint5", 32, True), ("int5", 32, False), 50, silu),
        (("int5", 32, False), ("e2m1", 32, False), 40, silu),
    ):  # fmt: skip
        x, shares = make.normal(tokens, 72, scale=0.5), make.normal(tokens, 2).abs()
        weights = shares / shares.sum(-1, keepdim=True)
        ids = torch.stack([make.order(4)[:2] for _ in range(tokens)])
        parts = random_experts(make, *first[:2], 80, 72, first[2]), random_experts(make, *second[:2], 72, 40, second[2])
        biases = (make.normal(4, 80, scale=0.5), make.normal(4, 72, scale=0.5)) if act == oss else (None, None)
        numbers = (first[1], KINDS[first[0]], second[1], KINDS[second[0]])
        yield x, ids, weights, *parts[0], *parts[1], *biases, act, 40, *numbers, 1.702, 7.0


def experts_codes_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """Experts as those of experts_panels, in int4 with groups of 32."""
    d, num, chosen, group = shape.hidden_size, shape.num_experts, shape.num_experts_per_tok, 32
    width = shape.intermediate_size // chosen // PANEL * PANEL

    def weight(num_out: int, num_in: int) -> tuple:
        words = torch.zeros(num, num_out // PANEL, num_words(num_in, 4), PANEL, dtype=torch.int32, device=make.device)
        return words, make.fill(num, num_out // PANEL, -(-num_in // group), PANEL), None, None

    first, second, kind = weight(2 * width, d), weight(d, width), KINDS["int4"]
    for tokens in make.tokens:
        ids = torch.arange(tokens * chosen, device=make.device).reshape(tokens, chosen) % num
        args = (make.fill(tokens, d), ids, make.fill(tokens, chosen), *first, *second, None, None,
                codes.EXPERT_ACTS["silu"], width, group, kind, group, kind, 1.702, 7.0)  # fmt: skip
        used = min(num, tokens * chosen) * 3 * d * width // 2 + 2 * tokens * d * make.dtype.itemsize
        label = f"{tokens} x {chosen} of {num}, {d} -> {width}"
        yield Workload(label, args, flops=6 * tokens * chosen * d * width, num_bytes=used)


@op(
    inputs=experts_codes_inputs,
    tolerance=24.0,
    workloads=experts_codes_workloads,
    weights=WEIGHTS,
    is_product=True,
    by_reference=True,
)
def experts_codes(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scales: Tensor, gate_up_zeros: Tensor | None,
    gate_up_order: Tensor | None, down: Tensor, down_scales: Tensor, down_zeros: Tensor | None,
    down_order: Tensor | None, gate_up_bias: Tensor | None, down_bias: Tensor | None, act: int, num_hidden: int,
    gate_up_group: int, gate_up_kind: int, down_group: int, down_kind: int, alpha: float, limit: float,
) -> Tensor:  # fmt: skip
    """`experts` with gate_up and down as codes[E, P, W, 16], scales and zeros[E, P, G, 16], and the inputs' orders
    [E, D] and [E, I]; each product as linear_codes computes it."""

    def first(rows: Tensor, expert: int) -> Tensor:
        parts = _of_expert((gate_up, gate_up_scales, gate_up_zeros, gate_up_order), expert)
        return linear_codes(rows, *parts, None, 2 * num_hidden, gate_up_group, gate_up_kind)

    def second(rows: Tensor, expert: int) -> Tensor:
        parts = _of_expert((down, down_scales, down_zeros, down_order), expert)
        return linear_codes(rows, *parts, None, x.shape[-1], down_group, down_kind)

    biases = gate_up_bias, down_bias
    return sum_of_experts(x, ids, weights, (first, second), biases, lambda hidden: gated(hidden, act, alpha, limit))


def _of_expert(parts: tuple[Tensor | None, ...], expert: int) -> tuple[Tensor | None, ...]:
    return tuple(None if part is None else part[expert] for part in parts)
