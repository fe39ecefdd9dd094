"""Norms. Legend: D features; all leading dims are rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.ops import codes
from fuseline.compile.ops.library import Make, ModelShape, Workload, op, same_layout

MODES = (codes.NORM_CAST_THEN_SCALE, codes.NORM_SCALE_THEN_CAST, codes.NORM_ONE_PLUS)


def rms_norm_inputs(make: Make) -> Iterator[tuple]:
    for mode in MODES:
        yield make.normal(1, 5, 77), make.normal(77), 1e-5, mode
    yield make.normal(1, 5, 77), None, 1e-5, codes.NORM_CAST_THEN_SCALE
    yield make.normal(1, 5, 3, 64)[..., :32], make.normal(32), 1e-5, codes.NORM_CAST_THEN_SCALE


def norm_workloads(num_inputs: int, takes_bias: bool) -> Callable[[Make, ModelShape], Iterator[Workload]]:
    """Arguments: rows of hidden states, then the weight, and the bias if the norm has one."""

    def workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
        d = shape.hidden_size
        for tokens in make.tokens:
            rows = tuple(make.fill(1, tokens, d) for _ in range(num_inputs))
            rest = (make.fill(d), 1e-5) if takes_bias else (1e-5, codes.NORM_CAST_THEN_SCALE)
            yield Workload(f"{tokens} x {d}", (*rows, make.fill(d), *rest))

    return workloads


@op(inputs=rms_norm_inputs, tolerance=4.0, workloads=norm_workloads(1, False), weights=("weight",))
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, mode: int) -> Tensor:
    """x / rms(x) * weight; `mode` fixes where the result is rounded to x's dtype (codes.h)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return wide.to(x.dtype)
    if mode == codes.NORM_CAST_THEN_SCALE:
        return weight * wide.to(x.dtype)
    scale = weight.float() + 1.0 if mode == codes.NORM_ONE_PLUS else weight.float()
    return (wide * scale).to(x.dtype)


@op(
    fake=lambda x, *_: (same_layout(x), same_layout(x)),
    inputs=lambda make: [(make.normal(1, 5, 77), make.normal(1, 5, 77), make.normal(77), 1e-6, mode) for mode in MODES],
    tolerance=4.0,
    workloads=norm_workloads(2, False),
    weights=("weight",),
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, mode: int) -> tuple[Tensor, Tensor]:
    """Returns (norm of the sum, the sum); the sum is rounded to x's dtype first."""
    total = x + residual
    return rms_norm(total, weight, eps, mode), total


def layer_norm_inputs(make: Make) -> Iterator[tuple]:
    for weight, bias in ((make.normal(77), make.normal(77)), (make.normal(77), None), (None, None)):
        yield make.normal(5, 77), weight, bias, 1e-5


@op(inputs=layer_norm_inputs, tolerance=4.0, workloads=norm_workloads(1, True), weights=("weight", "bias"))
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@op(
    fake=lambda x, *_: (same_layout(x), same_layout(x)),
    inputs=lambda make: [(make.normal(5, 77), *args) for args in layer_norm_inputs(make)],
    tolerance=4.0,
    workloads=norm_workloads(2, True),
    weights=("weight", "bias"),
)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer_norm(total, weight, bias, eps), total
