"""Gated activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.ops import codes
from fuseline.compile.ops.library import Make, ModelShape, Workload, op

ACTIVATIONS = {
    codes.UNARY["silu"]: F.silu,
    codes.UNARY["gelu"]: F.gelu,
    codes.UNARY["gelu_tanh"]: lambda x: F.gelu(x, approximate="tanh"),
    codes.UNARY["relu"]: F.relu,
}


def act_mul_inputs(make: Make) -> Iterator[tuple]:
    for act in ACTIVATIONS:
        yield make.normal(1, 3, 37, scale=3.0), make.normal(1, 3, 37), act
    joined = make.normal(5, 2 * 48)
    yield joined[:, :48], joined[:, 48:], codes.UNARY["silu"]


def act_mul_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """gate and up are the two halves of one product."""
    width = shape.intermediate_size
    for tokens in make.tokens:
        joined = make.fill(1, tokens, 2 * width)
        yield Workload(f"{tokens} x {width}", (joined[..., :width], joined[..., width:], codes.UNARY["silu"]))


@op(inputs=act_mul_inputs, tolerance=8.0, workloads=act_mul_workloads, sums=False)
def act_mul(gate: Tensor, up: Tensor, act: int) -> Tensor:
    """Computes act(gate) * up; act(gate) is rounded to the dtype first, as Transformers' two ops do."""
    return ACTIVATIONS[act](gate) * up
