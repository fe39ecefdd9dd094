"""fp8 by fp8 through torch: `torch._scaled_mm`, cuBLASLt's or CUTLASS's product with a scale for each row of both.

A private function of torch: used where its trial gives our kernel's results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fuseline.compile.kernels.registry import NATIVE, Implementation, OpCall
from fuseline.compile.kernels.triton.fp8 import ISAS
from fuseline.compile.ops.fp8 import E4M3, quantize_fp8
from fuseline.compile.target import Target

TRIED_ROWS = 48
Product = Callable[..., Tensor]


def linear_fp8(
    product: Product, x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, group: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x[..., K] e4m3 times a weight of e4m3 codes [N, W] with a scale a row -> [..., N]."""
    num_out, num_in = codes.shape[0], x.shape[-1]
    if not x.numel():
        return x.new_empty(*x.shape[:-1], num_out, dtype=dtype)
    y = product(
        x.reshape(-1, num_in), codes.view(E4M3).t(), scale_a=x_scales.reshape(-1, 1),
        scale_b=scales[:, :num_out].float(), bias=bias, out_dtype=dtype, use_fast_accum=False,
    )  # fmt: skip
    return y.view(*x.shape[:-1], num_out)


def _multiplies(
    x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype
) -> bool:
    """Sizes in sixteens; scales of rows are for bf16 results only."""
    is_sized = x.shape[-1] % 16 == 0 and codes.shape[0] % 16 == 0
    return group == 0 and is_sized and dtype == torch.bfloat16 and (bias is None or bias.dtype == dtype)


def _trial(call: OpCall, phases: tuple[str, ...]) -> tuple[tuple, Mapping[str, Tensor]]:
    """Some rows times a weight of the call's shape."""
    x, _, codes, scales, bias, group, dtype = call.args
    device = call.target.device
    rows = quantize_fp8.op.reference(torch.randn(TRIED_ROWS, x.shape[-1]))
    weight = torch.randint(0x38, codes.shape, dtype=torch.uint8).repeat(1, 4)[:, : 4 * codes.shape[1]]
    parts = weight.contiguous().view(torch.int32), torch.full(scales.shape, 2.0**-8, dtype=scales.dtype)
    biases = None if bias is None else torch.randn(bias.shape).to(bias.dtype)
    args = (part if part is None else part.to(device) for part in (*rows, *parts, biases))
    return (*args, group, dtype), {}


def _find(target: Target) -> Product | None:
    is_there = target.device == "cuda" and target.isa in ISAS
    return getattr(torch, "_scaled_mm", None) if is_there else None


IMPLEMENTATIONS = (
    Implementation(
        "linear_fp8", "torch._scaled_mm", "cuda", linear_fp8, supports=_multiplies, order=NATIVE, library=_find,
        isas=ISAS, trial=_trial,
    ),
)  # fmt: skip
