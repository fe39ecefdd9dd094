"""A product of each head with its own weight. Legend: H heads, T tokens, K inputs, N outputs of a head, P panels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fuseline.compile.ops.library import ROWS, CallShape, Make, ModelShape, StepSize, Workload, op
from fuseline.compile.ops.linear import pack, unpack


def head_linear_inputs(make: Make) -> Iterator[tuple]:
    """Heads as slices of a joined product's output; more tokens than a tile has rows, odd sizes, a depth over 512."""
    for heads, tokens, num_in, num_out in ((3, 1, 24, 40), (2, 70, 33, 7), (2, 5, 520, 130)):
        joined = make.normal(1, tokens, heads, num_in + 8).transpose(1, 2)
        yield joined[..., 8:], make.normal(heads, num_out, num_in, scale=num_in**-0.5)


def head_linear_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """Queries to latents of four times a head's numbers, and such latents to values."""
    dim, rank = shape.head_dim, 4 * shape.head_dim
    for tokens in make.tokens:
        for num_in, num_out in ((dim, rank), (rank, dim)):
            x, panels = make.fill(1, shape.num_heads, tokens, num_in), pack(make.fill(shape.num_heads, num_out, num_in))
            flops = 2 * tokens * shape.num_heads * num_in * num_out
            label = f"{tokens} x {shape.num_heads} heads, {num_in} to {num_out}"
            yield Workload(label, (x, panels, num_out), flops=flops)


def make_heads(inputs: Mapping[str, Tensor], fixed: Mapping[str, object], step: StepSize) -> dict[str, Tensor]:
    """Heads of `step.rows` tokens."""
    x = inputs["x"]
    return {"x": step.randn(x, 1, step.rows, x.shape[1], x.shape[3]).transpose(1, 2)}


@op(
    fake=lambda x, weight: x.new_empty(1, x.shape[2], x.shape[1], weight.shape[1]),
    inputs=head_linear_inputs,
    tolerance=12.0,
    weights=("weight",),
    calls=CallShape(lambda x, *_: (ROWS, x.shape[2]), make_heads),
)
def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x[1, H, T, K] times the weight[H, N, K] of each head -> [1, T, H, N]."""
    return (x[0] @ weight.mT).transpose(0, 1)[None].contiguous()


def head_linear_panels_inputs(make: Make) -> Iterator[tuple]:
    for x, weight in head_linear_inputs(make):
        yield x, pack(weight), weight.shape[1]


@op(
    fake=lambda x, panels, num_out: x.new_empty(1, x.shape[2], x.shape[1], num_out),
    inputs=head_linear_panels_inputs,
    tolerance=12.0,
    workloads=head_linear_workloads,
    weights=("panels",),
    calls=CallShape(lambda x, *_: (ROWS, x.shape[2]), make_heads),
)
def head_linear_panels(x: Tensor, panels: Tensor, num_out: int) -> Tensor:
    """The same with packed weights [H, P, K, 16] of `num_out` outputs."""
    return head_linear(x, unpack(panels, num_out))
