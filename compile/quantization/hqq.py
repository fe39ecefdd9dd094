"""HQQ checkpoints (Badri and Shaji): 1, 2, 3, 4 or 8 bits, with scales and zeros of any value.

    W_q: the codes as [N * K / group, group] (axis 1) or [group, N * K / group] (axis 0), in the order of the weight;
         a byte (3 bits: an int32) has codes of rows a whole part apart, the first in its highest bits
    scale, zero: one for each of axis 1's rows or axis 0's columns; nbits, group_size, axis, shape: scalars and a pair,
         where the package wrote them; else config.json's

Groups of axis 0 run over outputs, which no layout holds: those are dequantized as they are loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization.bits import kind_of
from fuseline.compile.quantization.published import (
    Method,
    Published,
    QuantizationError,
    Read,
    Tensors,
    one_of,
)

CODES, SCALES, ZEROS = ".W_q", ".scale", ".zero"
NUMBERS = ("nbits", "group_size", "axis")
OTHERS = (
    "shape packing unpack_view_dtype view_as_float quant_scale quant_zero compute_dtype offload_meta channel_wise "
    "encoded_state_dict stores_quant_config optimize round_zero"
).split()
SUFFIXES = (CODES, SCALES, ZEROS, *(f".{name}" for name in (*NUMBERS, *OTHERS)))
PER_WORD = {1: 8, 2: 4, 3: 10, 4: 2, 8: 1}
"""Codes of a byte; 3 bits: of an int32."""


def read(config: Mapping[str, Any]) -> Method:
    params = (config.get("quant_config") or config).get("weight_quant_params") or {}
    one_of(params.get("nbits", 4), tuple(PER_WORD), "hqq: nbits")
    return Method("hqq", SUFFIXES, functools.partial(_find, params))


def _find(params: Mapping[str, Any], module: str, tensors: Tensors, value: Read) -> Published | None:
    if CODES not in tensors:
        return None
    for flag in (".quant_scale", ".quant_zero"):
        if flag in tensors and value(flag).item():
            raise QuantizationError(f"{module}{flag} is set: scales and zeros that are quantized are not supported")
    known = {name: int(value(f".{name}")) if f".{name}" in tensors else params.get(name) for name in NUMBERS}
    bits, axis = one_of(known["nbits"], tuple(PER_WORD), f"{module}.nbits"), known["axis"]
    one_of(axis, (0, 1), f"{module}.axis")
    if ".shape" not in tensors:
        raise QuantizationError(f"{module}.shape is missing")
    num_out, num_in = value(".shape").tolist()
    groups = tensors[SCALES].numel()
    group = num_out * num_in // groups
    if tensors[ZEROS].numel() != groups or groups * group != num_out * num_in:
        raise QuantizationError(f"{module}: {groups} scales and {tensors[ZEROS].numel()} zeros do not fit a weight of "
                                f"{num_out} x {num_in}")  # fmt: skip
    stored = _Stored(bits, axis, group, (num_out, num_in))
    if axis == 0 or num_in % group:
        return Published(None, stored.shape, stored.values)
    layout = Layout(kind_of(bits), group if group < num_in else 0, "float32", has_zeros=True)
    return Published(layout, stored.shape, stored.decode)


@dataclass(frozen=True)
class _Stored:
    bits: int
    axis: int
    group: int
    shape: tuple[int, int]

    def decode(self, tensors: Tensors) -> Coded:
        """Zeros are floats, and codes of 4 bits stand for code - 8: in float32 the difference is exact."""
        codes, (num_out, _) = self._codes(tensors[CODES]).view(self.shape), self.shape
        scales, zeros = (tensors[name].float().view(num_out, -1) for name in (SCALES, ZEROS))
        if self.bits == 8:
            return Coded((codes.to(torch.int16) - 128).to(torch.int8), scales, zeros - 128)
        return Coded(codes, scales, zeros - 8)

    def values(self, tensors: Tensors) -> Tensor:
        codes = self._codes(tensors[CODES]).float()
        values = (codes - tensors[ZEROS].float()) * tensors[SCALES].float()
        return values.reshape(self.shape)

    def _codes(self, words: Tensor) -> Tensor:
        """[rows, columns] uint8 as they were before packing."""
        per = PER_WORD[self.bits]
        wide = words.view(torch.uint8 if self.bits != 3 else torch.int32).to(torch.int32)
        parts = [(wide >> (self.bits * (per - 1 - j))) & ((1 << self.bits) - 1) for j in range(per)]
        rows = self.group if self.axis == 0 else self.shape[0] * self.shape[1] // self.group
        return torch.cat(parts)[:rows].to(torch.uint8)
