"""compressed-tensors checkpoints (llm-compressor).

    pack-quantized    weight_packed[N, K * bits / 32] int32, weight_scale[N, G], weight_zero_point[N * bits / 32, G]?,
                      weight_g_idx[K]?, weight_shape
    int-quantized     weight[N, K] int8, weight_scale[N, 1 or G], weight_zero_point?
    naive-quantized   the same;  float-quantized   weight[N, K] fp8: fp8.py
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization import fp8
from fuseline.compile.quantization.bits import unpack
from fuseline.compile.quantization.published import (
    Method,
    Published,
    QuantizationError,
    Read,
    Tensors,
    dtype_name,
    one_of,
)

PACKED, SCALES, ZEROS, INDEX = ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx"
SUFFIXES = (".weight", PACKED, SCALES, ZEROS, INDEX, ".weight_shape", ".input_scale", ".input_zero_point")
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def read(config: Mapping[str, Any]) -> Method:
    one_of(config.get("quantization_status", "compressed"), ("compressed", "frozen"),
           "compressed-tensors: quantization_status")  # fmt: skip
    schemes = [_scheme(group, config) for group in (config.get("config_groups") or {}).values()]
    block = next((scheme["block_structure"] for scheme in schemes if scheme.get("block_structure")), None)
    return Method("compressed-tensors", SUFFIXES, functools.partial(_find, block))


def _scheme(group: object, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights' scheme of a group. Raises QuantizationError."""
    if not isinstance(group, Mapping):
        raise QuantizationError(f"compressed-tensors: the scheme {group!r} is no object")
    weights, form = group.get("weights") or {}, group.get("format") or config.get("format")
    if form != "mixed-precision":
        one_of(form, FORMATS, "compressed-tensors: format")
    one_of((weights.get("type", "int"), weights.get("num_bits")), (("int", 4), ("int", 8), ("float", 8)),
           "compressed-tensors: weights of (type, num_bits)")  # fmt: skip
    return weights


def _find(block: list[int] | None, module: str, tensors: Tensors, value: Read) -> Published | None:
    if PACKED in tensors:
        return _packed(module, tensors, value)
    weight = tensors.get(".weight")
    if weight is None or weight.dtype != torch.int8:
        return fp8.find(block, module, tensors, value)
    if SCALES not in tensors:
        raise QuantizationError(f"{module}.weight is int8 without a weight_scale")
    shape, rows = tuple(weight.shape), tensors[SCALES].numel() > 1
    layout = _layout("int8", shape[1], tensors)
    cuts = {".weight": 1} | ({SCALES: 1, ZEROS: 1} if rows else {})
    return Published(layout, shape, functools.partial(_decode_int8, layout), cuts)


def _packed(module: str, tensors: Tensors, value: Read) -> Published:
    shape = tuple(value(".weight_shape").tolist())
    bits = 4 if tensors[PACKED].shape[1] == -(-shape[1] // 8) else 8
    layout = _layout(f"int{bits}", shape[1], tensors)
    cuts = {PACKED: 1, SCALES: 1, ZEROS: 32 // bits}
    return Published(layout, shape, functools.partial(_decode_packed, bits, shape[1], layout), cuts)


def _layout(kind: str, num_in: int, tensors: Tensors) -> Layout:
    scales = tensors[SCALES]
    groups = scales.shape[1] if scales.ndim == 2 else 1
    group = -(-num_in // groups) if groups > 1 else 0
    return Layout(kind, group, dtype_name(scales), ZEROS in tensors, has_order=INDEX in tensors)


def _decode_int8(layout: Layout, tensors: Tensors) -> Coded:
    codes = tensors[".weight"]
    scales, zeros = (None if of is None else of.reshape(-1, of.shape[-1] if of.ndim == 2 else 1).expand(len(codes), -1)
                     for of in (tensors[SCALES], tensors.get(ZEROS)))  # fmt: skip
    return Coded(codes, scales, None if zeros is None else zeros.to(scales.dtype))


def _decode_packed(bits: int, num_in: int, layout: Layout, tensors: Tensors) -> Coded:
    half, codes = 1 << (bits - 1), unpack(tensors[PACKED], bits)[:, :num_in]
    codes = codes if bits == 4 else _less_half(codes, half).to(torch.int8)
    scales, zeros = tensors[SCALES], None
    if layout.has_zeros:
        zeros = _less_half(unpack(tensors[ZEROS].T, bits).T, half)[: len(codes)].to(scales.dtype)
    order = torch.argsort(tensors[INDEX].long(), stable=True) if layout.has_order else None
    return Coded(codes if order is None else codes[:, order], scales, zeros, order)


def _less_half(codes: Tensor, half: int) -> Tensor:
    return codes.to(torch.int16) - half
