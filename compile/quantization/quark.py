"""Quark checkpoints (AMD): what a weight is comes from config.json, for all layers or by the pattern of their names.

    fp8_e4m3     weight[N, K] float8_e4m3fn, weight_scale[] or [N]
    int8, uint8  weight[N, K], weight_scale[] or [N]; in groups transposed: weight[K, N], weight_scale[G, N]
    int4, uint4  weight[N, K / 8] int32, or in groups transposed [K, N / 8]; weight_scale as that of int8
    fp4          weight[N, K / 2] uint8, weight_scale[N, K / 32] (float4.py)

weight_zero_point is packed as the weight is. Words have the order of AWQ's where export.pack_method is "reorder".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization import float4, fp8
from fuseline.compile.quantization.awq import ORDER
from fuseline.compile.quantization.bits import kind_of, unpack
from fuseline.compile.quantization.published import (
    Method,
    Published,
    QuantizationError,
    Read,
    Tensors,
    dtype_name,
    one_of,
)

WEIGHT, SCALES, ZEROS = ".weight", ".weight_scale", ".weight_zero_point"
SUFFIXES = (
    WEIGHT, SCALES, ZEROS, ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".bias_scale",
)  # fmt: skip
BITS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8}
DTYPES = (*BITS, "fp8_e4m3", "fp4")
SCHEMES = ("per_tensor", "per_channel", "per_group")


def read(config: Mapping[str, Any]) -> Method:
    is_reordered = (config.get("export") or {}).get("pack_method", "reorder") == "reorder"
    whole = _spec(config.get("global_quant_config") or {}, "quark: global_quant_config")
    own = {name: _spec(layer, f"quark: layer_quant_config of {name}")
           for name, layer in (config.get("layer_quant_config") or {}).items()}  # fmt: skip

    def find(module: str, tensors: Tensors, value: Read) -> Published | None:
        spec = next((spec for name, spec in own.items() if fnmatch(module, name)), whole)
        weight = tensors.get(WEIGHT)
        if weight is None or (weight.is_floating_point() and weight.itemsize > 1):
            return None
        if SCALES not in tensors:
            raise QuantizationError(f"{module}{WEIGHT} is {dtype_name(weight)} without a weight_scale")
        return _find(spec, is_reordered, module, tensors, value)

    return Method("quark", SUFFIXES, find)


def _spec(layer: Mapping[str, Any], what: str) -> Mapping[str, Any] | None:
    """The weights' settings; None for a layer without any. Raises QuantizationError."""
    weight = layer.get("weight")
    if weight is None:
        return None
    if not isinstance(weight, Mapping):
        raise QuantizationError(f"{what}: weights of several steps are not supported")
    one_of(weight.get("dtype"), DTYPES, f"{what}: dtype of weights")
    one_of(weight.get("qscheme"), SCHEMES, f"{what}: qscheme of weights")
    return weight


def _find(
    spec: Mapping[str, Any] | None, is_reordered: bool, module: str, tensors: Tensors, value: Read
) -> Published | None:
    if spec is None:
        raise QuantizationError(f"{module}{SCALES} is stored, but config.json gives the layer no scheme")
    if spec["dtype"] == "fp8_e4m3":
        return fp8.find([], module, tensors, value)
    if spec["dtype"] == "fp4":
        return float4.find((WEIGHT, SCALES, ""), False, module, tensors)
    integers = _Integers(spec["dtype"], spec["qscheme"] == "per_group", is_reordered)
    return integers.find(module, tensors)


@dataclass(frozen=True)
class _Integers:
    dtype: str
    has_groups: bool
    is_reordered: bool

    def find(self, module: str, tensors: Tensors) -> Published:
        rows, words = tensors[WEIGHT].shape
        columns = words * 8 if self.bits == 4 else words
        num_out, num_in = (columns, rows) if self.has_groups else (rows, columns)
        scales = tensors[SCALES]
        if tuple(scales.shape) not in ([(), (1,), (num_out,)] if not self.has_groups else [(len(scales), num_out)]):
            raise QuantizationError(f"{module}{SCALES} has shape {list(scales.shape)}, which does not fit {num_out} "
                                    f"outputs of {num_in} inputs")  # fmt: skip
        group = num_in // len(scales) if self.has_groups else 0
        layout = Layout(kind_of(self.bits), group, dtype_name(scales), has_zeros=ZEROS in tensors)
        return Published(layout, (num_out, num_in), self.decode)

    def decode(self, tensors: Tensors) -> Coded:
        values = self._unpacked(tensors[WEIGHT])
        codes = values + 8 if self.bits == 4 else values
        scales = self._of_rows(tensors[SCALES].T if self.has_groups else tensors[SCALES], len(codes))
        zeros = self._of_rows(self._unpacked(tensors[ZEROS]), len(codes)) if ZEROS in tensors else None
        return Coded(codes.to(torch.uint8 if self.bits == 4 else torch.int8), scales,
                     None if zeros is None else zeros.to(scales.dtype))  # fmt: skip

    @property
    def bits(self) -> int:
        return BITS[self.dtype]

    def _unpacked(self, stored: Tensor) -> Tensor:
        """Signed integers [N, ...] int16; those that are unsigned less half of their range, as zeros are, too."""
        values = stored
        if self.bits == 4 and stored.dtype == torch.int32 and stored.ndim:
            values = unpack(stored, 4, ORDER if self.is_reordered else None)
        values = values.T if self.has_groups else values
        half = 1 << (self.bits - 1)
        wide = values.to(torch.int16) & (2 * half - 1)
        return wide - half if self.dtype.startswith("u") else (wide ^ half) - half

    @staticmethod
    def _of_rows(values: Tensor, num_out: int) -> Tensor:
        """[], [1], [N] or [N, G] -> [N, G]."""
        return values if values.ndim == 2 else values.reshape(-1, 1).expand(num_out, 1)
