"""Mixture of experts. Legend: T tokens, K experts per token, E experts, D features, I hidden size of an expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fuseline.compile.ops import codes
from fuseline.compile.ops.activation import ACTIVATIONS
from fuseline.compile.ops.library import (
    CallShape,
    Make,
    ModelShape,
    StepSize,
    Workload,
    batch_invariant,
    lines_size,
    op,
)

Product = Callable[[Tensor, int], Tensor]
"""product(rows[n, in], expert) -> [n, out]."""
EXPERT_WEIGHTS = ("gate_up", "down", "gate_up_bias", "down_bias")


def experts_inputs(make: Make) -> Iterator[tuple]:
    """4 experts, 2 per token, one without tokens; D = 24, I = 20; both layouts."""
    x, weights = make.normal(7, 24), make.normal(7, 2).abs()
    ids = torch.stack([make.order(3)[:2] for _ in range(7)])
    first, second = make.normal(4, 40, 24, scale=0.2), make.normal(4, 24, 20, scale=0.2)
    turned = first.transpose(1, 2).contiguous(), second.transpose(1, 2).contiguous()
    biases = make.normal(4, 40), make.normal(4, 24)
    for act in codes.EXPERT_ACTS.values():
        yield x, ids, weights, first, second, None, None, act, False, 1.702, 7.0
    yield x, ids, weights, *turned, *biases, codes.EXPERT_ACTS["glu_oss"], True, 1.702, 7.0


def make_tokens(inputs: Mapping[str, Tensor], fixed: Mapping[str, object], step: StepSize) -> dict[str, Tensor]:
    """Tokens that go to experts at random."""
    top_k = inputs["ids"].shape[1]
    num_experts = next(fixed[name] for name in ("gate_up", "weight", "panels") if name in fixed).shape[0]
    chosen = torch.rand(step.rows, num_experts).topk(top_k).indices.to(step.device)
    floats = {name: step.randn(x, step.rows, x.shape[1]) for name, x in inputs.items() if name != "ids"}
    return {**floats, "ids": chosen}


@op(
    inputs=experts_inputs,
    tolerance=12.0,
    weights=EXPERT_WEIGHTS,
    is_product=True,
    invariant="experts_invariant",
    calls=CallShape(lines_size, make_tokens),
)
def experts(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, act: int, transposed: bool, alpha: float, limit: float,
) -> Tensor:  # fmt: skip
    """x[T, D] through K experts each, weighted, summed. gate_up[E, 2I, D], down[E, D, I]; transposed: [E, in, out]."""

    def product(rows: Tensor, matrix: Tensor) -> Tensor:
        return rows @ (matrix if transposed else matrix.T)

    return sum_of_experts(
        x, ids, weights, (lambda rows, expert: product(rows, gate_up[expert]),
                          lambda rows, expert: product(rows, down[expert])),
        (gate_up_bias, down_bias), lambda hidden: gated(hidden, act, alpha, limit),
    )  # fmt: skip


def sum_of_experts(
    x: Tensor, ids: Tensor, weights: Tensor, products: tuple[Product, Product],
    biases: tuple[Tensor | None, Tensor | None], gate: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """The experts of any storage of weights: `products` are those with gate_up and down.

    Rounds as Transformers does: after each product, each bias and the product with the routing weight.
    """
    out = torch.zeros(x.shape[0], x.shape[1], dtype=x.dtype)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        hidden = _plus(products[0](x[token], expert), biases[0], expert)
        hidden = _plus(products[1](gate(hidden), expert), biases[1], expert)
        out.index_add_(0, token, hidden * weights[token, slot, None].to(x.dtype))
    return out


def _plus(hidden: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    return hidden if bias is None else hidden + bias[expert]


experts_invariant = batch_invariant(experts)


def expert_linear_inputs(make: Make) -> Iterator[tuple]:
    """4 experts, 2 per token, one without tokens and an id beyond them; D = 24, N = 20; both layouts."""
    x, weight, bias = make.normal(7, 24), make.normal(4, 20, 24, scale=0.2), make.normal(4, 20)
    ids = torch.stack([make.order(3)[:2] for _ in range(7)])
    ids[2, 1] = 4
    yield x, ids, weight, None, False
    yield x, ids, weight.transpose(1, 2).contiguous(), bias, True
    yield x, ids[:, :1], weight, bias, False


@op(
    fake=lambda x, ids, weight, bias, transposed: x.new_empty(*ids.shape, weight.shape[2 if transposed else 1]),
    inputs=expert_linear_inputs,
    tolerance=12.0,
    weights=("weight", "bias"),
    calls=CallShape(lines_size, make_tokens),
)
def expert_linear(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Each token's product with those of its K experts: x[T, D], weight[E, N, D], bias[E, N] -> [T, K, N].

    transposed: weight[E, D, N]. Zeros for ids outside [0, E).
    """
    turned = weight if transposed else weight.mT
    out = x.new_zeros(*ids.shape, turned.shape[2])
    for expert in range(len(weight)):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        out[token, slot] = _plus(x[token] @ turned[expert], bias, expert)
    return out


def gated(hidden: Tensor, act: int, alpha: float, limit: float) -> Tensor:
    """Hidden states [T, I] from [T, 2I], the gates and ups in halves or, for gpt-oss, in pairs."""
    if (unary := codes.EXPERT_UNARY[act]) is not None:
        gate, up = hidden.chunk(2, -1)
        return ACTIVATIONS[unary](gate) * up
    gate, up = hidden[..., ::2].clamp(max=limit), hidden[..., 1::2].clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def route_topk_inputs(make: Make) -> Iterator[tuple]:
    """Scores far enough apart that no dtype's rounding makes them equal, so that their order is unique."""
    scores = torch.stack([make.order(8) for _ in range(9)]).to(make.dtype) / 2
    softmax_first, softmax_last = codes.ROUTE_SOFTMAX_TOPK, codes.ROUTE_TOPK_SOFTMAX
    for order, renormalize in ((softmax_first, 0), (softmax_first, 1), (softmax_last, 0)):
        yield scores, 3, order, renormalize, make.dtype
        yield scores, 3, order, renormalize, torch.float32


def route_topk_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    num, chosen = shape.num_experts, shape.num_experts_per_tok
    for tokens in make.tokens:
        scores = make.normal(tokens, num)
        yield Workload(f"{tokens} x {chosen} of {num}", (scores, chosen, codes.ROUTE_SOFTMAX_TOPK, 1, make.dtype))


@op(
    fake=lambda logits, k, order, renormalize, dtype: (
        logits.new_empty(logits.shape[0], k, dtype=dtype),
        logits.new_empty(logits.shape[0], k, dtype=torch.int64),
    ),
    inputs=route_topk_inputs,
    tolerance=1.0,
    workloads=route_topk_workloads,
)
def route_topk(logits: Tensor, k: int, order: int, renormalize: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns (weights[T, K] of `dtype`, ids[T, K]) for logits[T, E]; the softmax is fp32, rounded once."""
    if order == codes.ROUTE_TOPK_SOFTMAX:
        best, ids = logits.topk(k, -1)
        return best.float().softmax(-1).to(dtype), ids
    weights, ids = logits.float().softmax(-1).topk(k, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(dtype), ids
