"""Linears with packed weights. Legend: N outputs, K inputs, P = ceil(N / 16) panels, E experts, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.ops import codes
from fuseline.compile.ops.activation import act_mul
from fuseline.compile.ops.library import Make, ModelShape, Workload, batch_invariant, op
from fuseline.compile.ops.moe import EXPERT_WEIGHTS, expert_linear, expert_linear_inputs, experts

PANEL = 16


def pack(weight: Tensor) -> Tensor:
    """[..., N, K] -> [..., P, K, 16], zero padded; bf16 in pairs of k, [..., P, K / 2, 16, 2], in the same storage."""
    rows = weight.shape[-2]
    panels = -(-rows // PANEL)
    padded = F.pad(weight, (0, 0, 0, panels * PANEL - rows))
    plain = padded.unflatten(-2, (panels, PANEL)).transpose(-1, -2).contiguous()
    return _in_pairs(plain, (2, PANEL)) if weight.dtype == torch.bfloat16 else plain


def unpack(panels: Tensor, num_rows: int) -> Tensor:
    """The inverse of pack."""
    plain = _in_pairs(panels, (PANEL, 2)) if panels.dtype == torch.bfloat16 else panels
    return plain.transpose(-1, -2).flatten(-3, -2)[..., :num_rows, :]


def _in_pairs(panels: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Swaps between [2][16] and [16][2] for every two k of [..., K, 16]; an odd last k stays."""
    even = panels.shape[-2] // 2 * 2
    pairs = panels[..., :even, :].reshape(*panels.shape[:-2], even // 2, *sizes).transpose(-1, -2)
    return torch.cat((pairs.reshape(*panels.shape[:-2], even, PANEL), panels[..., even:, :]), -2)


def linear_inputs(make: Make) -> Iterator[tuple]:
    for rows, num_out, bias in ((1, 33, False), (3, 33, True), (17, 64, False)):
        panels = pack(make.normal(num_out, 75, scale=0.1))
        yield make.normal(1, rows, 75), panels, make.normal(num_out) if bias else None, num_out


def experts_panels_inputs(make: Make) -> Iterator[tuple]:
    """4 experts, 2 per token; D = 24, I = 20."""
    x, weights = make.normal(7, 24), make.normal(7, 2).abs()
    ids = torch.stack([make.order(4)[:2] for _ in range(7)])
    first, second = pack(make.normal(4, 40, 24, scale=0.2)), pack(make.normal(4, 24, 20, scale=0.2))
    biases = make.normal(4, 40), make.normal(4, 24)
    for act in codes.EXPERT_ACTS.values():
        yield x, ids, weights, first, second, None, None, act, 20, 1.702, 7.0
    yield x, ids, weights, first, second, *biases, codes.EXPERT_ACTS["glu_oss"], 20, 1.702, 7.0


def linear_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """Every linear of a layer and the logits for one token, the largest linear of a layer for more."""
    d, width = shape.hidden_size, shape.intermediate_size
    joined = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    products = [(1, joined, d), (1, d, shape.num_heads * shape.head_dim), (1, 2 * width, d), (1, d, width)]
    products += [(1, shape.vocab_size, d), *((tokens, 2 * width, d) for tokens in make.tokens[1:])]
    for tokens, num_out, num_in in products:
        panels = make.fill(-(-num_out // PANEL), num_in, PANEL)
        args = (make.fill(1, tokens, num_in), panels, None, num_out)
        yield Workload(f"{tokens} x {num_in} -> {num_out}", args, flops=2 * tokens * num_in * num_out)


def embedding_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    d = shape.hidden_size
    panels = make.fill(-(-shape.vocab_size // PANEL), d, PANEL)
    for tokens in make.tokens:
        moved = 2 * tokens * d * make.dtype.itemsize
        args = (make.ids(shape.vocab_size, 1, tokens), panels, shape.vocab_size)
        yield Workload(f"{tokens} x {d} of {shape.vocab_size}", args, num_bytes=moved)


def experts_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """Experts that are together as wide as a dense layer; every expert a token of its own where there are enough."""
    d, num, chosen = shape.hidden_size, shape.num_experts, shape.num_experts_per_tok
    width = shape.intermediate_size // chosen // PANEL * PANEL
    first, second = make.fill(num, 2 * width // PANEL, d, PANEL), make.fill(num, d // PANEL, width, PANEL)
    for tokens in make.tokens:
        ids = torch.arange(tokens * chosen, device=make.device).reshape(tokens, chosen) % num
        used = min(num, tokens * chosen) * 3 * d * width + 2 * tokens * d
        yield Workload(
            f"{tokens} x {chosen} of {num}, {d} -> {width}",
            (make.fill(tokens, d), ids, make.fill(tokens, chosen), first, second, None, None,
             codes.EXPERT_ACTS["silu"], width, 1.702, 7.0),
            flops=6 * tokens * chosen * d * width, num_bytes=used * make.dtype.itemsize,
        )  # fmt: skip


@op(
    fake=lambda x, panels, bias, num_out: x.new_empty(*x.shape[:-1], num_out),
    inputs=linear_inputs,
    tolerance=12.0,
    workloads=linear_workloads,
    weights=("panels", "bias"),
    is_product=True,
)
def linear_panels(x: Tensor, panels: Tensor, bias: Tensor | None, num_out: int) -> Tensor:
    """x[..., K] times packed weights -> [..., N]; fp32 accumulation, bias added before the single rounding."""
    return F.linear(x, unpack(panels, num_out), bias)


def linear_rows_inputs(make: Make) -> Iterator[tuple]:
    for rows, num_out, num_in, bias in ((1, 33, 75, False), (3, 33, 75, True), (70, 130, 64, True)):
        weight = make.normal(num_out, num_in, scale=0.1)
        yield make.normal(1, rows, num_in), weight, make.normal(num_out) if bias else None


@op(
    fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    inputs=linear_rows_inputs,
    tolerance=12.0,
    weights=("weight", "bias"),
    is_product=True,
    invariant="linear_invariant",
)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x[..., K] times weight[N, K] -> [..., N]."""
    return F.linear(x, weight, bias)


linear_invariant = batch_invariant(linear)


def linear_act_mul_inputs(make: Make) -> Iterator[tuple]:
    weight = make.normal(2 * 37, 75, scale=0.1)
    for act in ("silu", "gelu", "gelu_tanh", "relu"):
        yield make.normal(1, 3, 75), weight, make.normal(74) if act == "gelu" else None, codes.UNARY[act]
    yield make.normal(19, 75), weight, None, codes.UNARY["silu"]
    yield make.normal(2, 80), make.normal(2 * 24, 80, scale=0.1), None, codes.UNARY["silu"]


@op(
    fake=lambda x, weight, bias, act: x.new_empty(*x.shape[:-1], weight.shape[0] // 2),
    inputs=linear_act_mul_inputs,
    tolerance=12.0,
    weights=("weight", "bias"),
    is_product=True,
)
def linear_act_mul(x: Tensor, weight: Tensor, bias: Tensor | None, act: int) -> Tensor:
    """act(gate) * up, the halves of x[..., K] times weight[2I, K] -> [..., I]; rounded like the three separate ops."""
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    return act_mul(gate, up, act)


@op(
    fake=lambda ids, panels, num_rows: panels.new_empty(*ids.shape, panels.shape[1]),
    inputs=lambda make: [(make.ids(33, 1, 6), pack(make.normal(33, 20)), 33)],
    tolerance=0.0,
    workloads=embedding_workloads,
    weights=("panels",),
    sums=False,
)
def embedding_panels(ids: Tensor, panels: Tensor, num_rows: int) -> Tensor:
    """The rows `ids` of packed weights [P, K, 16] -> [..., K]."""
    return F.embedding(ids, unpack(panels, num_rows))


def expert_linear_panels_inputs(make: Make) -> Iterator[tuple]:
    for x, ids, weight, bias, transposed in expert_linear_inputs(make):
        rows = weight.mT if transposed else weight
        yield x, ids, pack(rows), bias, rows.shape[1]


def expert_linear_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """One of the two products of experts without gates."""
    d, num, chosen = shape.hidden_size, shape.num_experts, shape.num_experts_per_tok
    width = shape.intermediate_size // chosen // PANEL * PANEL
    for tokens in make.tokens:
        ids = torch.arange(tokens * chosen, device=make.device).reshape(tokens, chosen) % num
        args = (make.fill(tokens, d), ids, make.fill(num, width // PANEL, d, PANEL), None, width)
        yield Workload(f"{tokens} x {chosen} of {num}, {d} -> {width}", args, flops=2 * tokens * chosen * d * width)


@op(
    fake=lambda x, ids, panels, bias, num_out: x.new_empty(*ids.shape, num_out),
    inputs=expert_linear_panels_inputs,
    tolerance=12.0,
    workloads=expert_linear_workloads,
    weights=("panels", "bias"),
)
def expert_linear_panels(x: Tensor, ids: Tensor, panels: Tensor, bias: Tensor | None, num_out: int) -> Tensor:
    """`expert_linear` with packed weights [E, P, D, 16]."""
    return expert_linear(x, ids, unpack(panels, num_out), bias, False)


@op(inputs=experts_panels_inputs, tolerance=12.0, workloads=experts_workloads, weights=EXPERT_WEIGHTS, is_product=True)
def experts_panels(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, act: int, num_hidden: int, alpha: float, limit: float,
) -> Tensor:  # fmt: skip
    """`experts` with packed gate_up[E, P, D, 16] and down[E, P, I, 16]."""
    first, second = unpack(gate_up, 2 * num_hidden), unpack(down, x.shape[-1])
    return experts(x, ids, weights, first, second, gate_up_bias, down_bias, act, False, alpha, limit)
