"""Weights of 4-bit floats (e2m1) with a scale a group: NVFP4, and MXFP4 of linears.

    codes[N, K / 2] uint8: two a byte, the first in the low half
    NVFP4  scales[N, K / 16] fp8, and one float32 for all: a factor (modelopt) or a divisor (compressed-tensors)
    MXFP4  scales[N, K / 32] uint8: exponents, 127 being 1
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization.bits import unpack_nibbles
from fuseline.compile.quantization.published import Published, QuantizationError, Tensors


def find(names: Sequence[str], divides: bool, module: str, tensors: Tensors) -> Published | None:
    """`names`: suffixes of the codes, the scales and the float for all. `divides`: scales are divided by the last."""
    codes, scales, whole = names
    if codes not in tensors or tensors[codes].dtype != torch.uint8:
        return None
    if scales not in tensors:
        raise QuantizationError(f"{module}{codes} has no {scales}")
    num_out, num_in = tensors[codes].shape[0], tensors[codes].shape[1] * 2
    rows, groups = tensors[scales].shape
    if rows != num_out or num_in % groups:
        raise QuantizationError(f"{module}{scales} has shape {[rows, groups]}, which does not fit {num_out} outputs of "
                                f"{num_in} inputs")  # fmt: skip
    if tensors[scales].dtype == torch.float8_e4m3fn and whole not in tensors:
        raise QuantizationError(f"{module}{scales} has no {whole}")
    layout = Layout("lut4", num_in // groups, "float32", table="e2m1")
    decode = functools.partial(_decode, names, divides)
    return Published(layout, (num_out, num_in), decode, {codes: 1, scales: 1})


def _decode(names: Sequence[str], divides: bool, tensors: Tensors) -> Coded:
    codes, scales, whole = names
    values = tensors[scales]
    values = powers(values) if values.dtype == torch.uint8 else values.float()
    if whole in tensors:
        one = tensors[whole].float().reshape(())
        values = values / one if divides else values * one
    return Coded(unpack_nibbles(tensors[codes]), values)


def powers(exponents: Tensor) -> Tensor:
    """float32 of e8m0."""
    return torch.ldexp(torch.ones(exponents.shape), exponents.to(torch.int32) - 127)
