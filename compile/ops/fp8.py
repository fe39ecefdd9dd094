"""Linears of fp8 by fp8: inputs quantized to e4m3, each token's by its largest magnitude. For GPUs.

Legend: N outputs, K inputs, W words, G groups of inputs, as in code_rows.py; D features of a norm.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.ops import codes as codes_of
from fuseline.compile.ops.code_rows import code_parts, values_of
from fuseline.compile.ops.coded import KINDS, scaled
from fuseline.compile.ops.library import Make, ModelShape, Workload, batch_invariant, op
from fuseline.compile.ops.norm import add_rms_norm, rms_norm

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def fake_codes(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@op(
    fake=fake_codes,
    inputs=lambda make: [(make.normal(1, 3, 75, scale=3.0),), (make.normal(5, 32) * 0,), (make.normal(20, 520),)],
    sums=False,
)
def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[..., K] -> (codes [..., K] e4m3, scales [..., 1] float32): x is about codes * scales, no code above 448."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (wide / scales).clamp(-LARGEST, LARGEST).to(E4M3), scales


def norm_inputs(make: Make) -> Iterator[tuple]:
    for mode in (codes_of.NORM_CAST_THEN_SCALE, codes_of.NORM_ONE_PLUS):
        yield make.normal(1, 3, 75), make.normal(75), 1e-5, mode
    yield make.normal(5, 2, 40).transpose(0, 1), None, 1e-6, codes_of.NORM_SCALE_THEN_CAST


@op(fake=fake_codes, inputs=norm_inputs, weights=("weight",), sums=False)
def rms_norm_fp8(x: Tensor, weight: Tensor | None, eps: float, mode: int) -> tuple[Tensor, Tensor]:
    """`rms_norm`, rounded to the dtype of x, then `quantize_fp8`."""
    return quantize_fp8(rms_norm(x, weight, eps, mode).contiguous())


@op(
    fake=lambda x, *_: (*fake_codes(x), x.new_empty(x.shape)),
    inputs=lambda make: [(x, make.normal(*x.shape), *rest) for x, *rest in norm_inputs(make)],
    weights=("weight",),
    sums=False,
)
def add_rms_norm_fp8(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, mode: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm`, its norm then as `quantize_fp8`; the sum stays as it is."""
    y, total = add_rms_norm(x, residual, weight, eps, mode)
    return *quantize_fp8(y.contiguous()), total.contiguous()


def linear_fp8_inputs(make: Make) -> Iterator[tuple]:
    """A scale a row and for each 128 inputs, few and many rows."""
    for group, rows, num_out, num_in, has_bias in (
        (0, 1, 32, 64, False), (0, 3, 33, 80, True), (128, 20, 48, 304, False), (0, 40, 160, 256, True),
    ):  # fmt: skip
        words, scales, _, _ = code_parts(make, "fp8", group, num_out, num_in)
        x = make.normal(1, rows, num_in, scale=100.0).to(E4M3)
        x_scales = (1 + make.normal(1, rows, 1).abs().float()) / 100
        yield x, x_scales, words, scales, make.normal(num_out) if has_bias else None, group, make.dtype


def linear_fp8_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """The largest linear of a layer, with a scale a row."""
    num_in, num_out = shape.hidden_size, 2 * shape.intermediate_size
    words = torch.zeros(num_out, num_in // 4, dtype=torch.int32, device=make.device)
    for tokens in make.tokens:
        x, x_scales = make.fill(1, tokens, num_in).to(E4M3), make.fill(1, tokens, 1).float()
        args = (x, x_scales, words, make.fill(1, num_out), None, 0, make.dtype)
        yield Workload(f"{tokens} x {num_in} -> {num_out}", args, flops=2 * tokens * num_in * num_out)


@op(
    fake=lambda x, x_scales, codes, scales, bias, group, dtype: x.new_empty(
        *x.shape[:-1], codes.shape[0], dtype=dtype
    ),
    inputs=linear_fp8_inputs,
    tolerance=24.0,
    workloads=linear_fp8_workloads,
    weights=("codes", "scales", "bias"),
    is_product=True,
    invariant="linear_fp8_invariant",
)
def linear_fp8(
    x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype
) -> Tensor:
    """x[..., K] e4m3 times x_scales[..., 1], times a weight of e4m3 codes [N, W] -> [..., N]; fp32, rounded once.

    `group`: inputs that share one of scales [G, N'], a multiple of 128; 0: all of a row.
    """
    values = values_of(codes, KINDS["fp8"], None, x_scales)[:, : x.shape[-1]]
    weight = scaled(values, scales[:, : len(codes)].T, None, group, "fp8")
    y = F.linear(x.float(), weight) * x_scales
    return (y if bias is None else y + bias.float()).to(dtype)


linear_fp8_invariant = batch_invariant(linear_fp8)
