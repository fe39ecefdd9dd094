"""Linears whose inputs are quantized to int8, with weights of int8 or int4 codes: exact sums of integers, then scaled.

Legend: N outputs, K inputs, P panels, W words, G groups, as in linear_codes.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.ops.coded import KINDS, scaled
from fuseline.compile.ops.library import Make, ModelShape, Workload, op
from fuseline.compile.ops.linear_codes import (
    NAMES,
    from_panels,
    linear_codes_workloads,
    random_weight,
    values_of,
    wide,
)

STEPS = 127.5
"""Steps of a row's scale from 0 to its largest magnitude, as compressed-tensors has them for 8 bits."""


def quantize_rows(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes -128 .. 127, scales [..., 1]) in float32, ties rounded to even; `scale` [1]: that of every row."""
    x = x.float()
    if scale is None:
        largest = x.abs().amax(-1, keepdim=True)
        scale = torch.where(largest == 0, 1.0, largest / STEPS)
    scale = scale.float()
    return (x / scale).clamp(-128, 127).round(), scale


def linear_codes_int8_inputs(make: Make) -> Iterator[tuple]:
    """Both kinds, few and many rows, groups and rows, N and K that fill no panel and no word."""
    for (kind, group, num_in), rows in product(
        (("int8", 0, 75), ("int8", 8, 300), ("int8", 128, 1100), ("int4", 32, 75), ("int4", 128, 1152),
         ("int4", 0, 40)), (1, 3, 40),
    ):  # fmt: skip
        num_out, has_zeros = 33 + num_in // 4, num_in in (75, 1100)
        codes, scales, zeros = random_weight(make, kind, group, num_out, num_in, has_zeros)
        order = make.order(num_in) if kind == "int4" and group == 32 else None
        bias = make.normal(num_out) if rows == 3 else None
        x_scale = torch.tensor([0.02], device=make.device) if group == 0 else None
        yield make.normal(1, rows, num_in), codes, scales, zeros, order, bias, x_scale, num_out, group, KINDS[kind]


def linear_codes_int8_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """Those of linear_codes."""
    for work in linear_codes_workloads(make, shape):
        yield Workload(work.label, (*work.args[:6], None, *work.args[6:]), flops=work.flops)


@op(
    fake=lambda x, codes, scales, zeros, order, bias, x_scale, num_out, group, kind: x.new_empty(
        *x.shape[:-1], num_out
    ),
    inputs=linear_codes_int8_inputs,
    tolerance=24.0,
    workloads=linear_codes_int8_workloads,
    weights=("codes", "scales", "zeros", "order", "bias", "x_scale"),
    is_product=True,
    by_reference=True,
)
def linear_codes_int8(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None, bias: Tensor | None,
    x_scale: Tensor | None, num_out: int, group: int, kind: int,
) -> Tensor:  # fmt: skip
    """x[..., K], quantized by `x_scale` or each row by its largest magnitude, times a weight -> [..., N].

    fp32, rounded once. Codes of a group are multiplied and summed as integers, so that only the sums are rounded.
    """
    inputs, row_scales = quantize_rows(x if order is None else x[..., order], x_scale)
    values = values_of(from_panels(codes, num_out), kind, x)[:, : x.shape[-1]].to(wide(x))
    zeros = None if zeros is None else from_panels(zeros, num_out)
    weight = scaled(values, from_panels(scales, num_out), zeros, group, NAMES[kind])
    out = F.linear(inputs.to(wide(x)), weight) * row_scales.to(wide(x))
    return (out if bias is None else out + bias.to(wide(x))).to(x.dtype)
