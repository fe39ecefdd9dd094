"""compressed-tensors checkpoints (llm-compressor).

    pack-quantized        weight_packed[N, K * bits / 32] int32, weight_scale[N, G], weight_shape,
                          weight_zero_point[N * bits / 32, G]?, weight_g_idx[K]?; bits 2 .. 8
    int-quantized         weight[N, K] int8, weight_scale[N, 1 or G], weight_zero_point?
    naive-quantized       the same;  float-quantized, mxfp8-quantized   weight[N, K] fp8: fp8.py
    nvfp4-pack-quantized  weight_packed[N, K / 2] uint8, weight_scale, weight_global_scale: float4.py
    mxfp4-pack-quantized  the same without the last
    mxfp6-pack-quantized  weight_packed[N, 3 K / 4] uint8: four codes of e2m3 in three bytes; weight_scale as mxfp4's
    marlin-24             weight_packed, meta, scale_packed: marlin.py

What a weight is shows in its tensors, so that groups of a config may have a format each.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization import float4, fp8, marlin
from fuseline.compile.quantization.bits import centered, kind_of, unpack
from fuseline.compile.quantization.int8_inputs import with_inputs
from fuseline.compile.quantization.published import (
    Method,
    Published,
    QuantizationError,
    Read,
    Tensors,
    dtype_name,
    one_of,
)

PACKED, SCALES, ZEROS, INDEX, SHAPE = (
    ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx", ".weight_shape",
)  # fmt: skip
GLOBAL = ".weight_global_scale"
SPARSE = marlin.SPARSE_COMPRESSED
SUFFIXES = (
    ".weight", PACKED, SCALES, ZEROS, INDEX, SHAPE, GLOBAL, *SPARSE[1:], ".input_scale", ".input_zero_point",
    ".input_global_scale",
)  # fmt: skip
FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "marlin-24",
)  # fmt: skip
MICRO = 32
"""Inputs that share a scale of mxfp6."""
TYPES = (*(("int", bits) for bits in range(2, 9)), ("float", 4), ("float", 6), ("float", 8))


def read(config: Mapping[str, Any]) -> Method:
    one_of(config.get("quantization_status", "compressed"), ("compressed", "frozen"),
           "compressed-tensors: quantization_status")  # fmt: skip
    sparsity = (config.get("sparsity_config") or {}).get("format") or "dense"
    one_of(sparsity, ("dense",), "compressed-tensors: format of sparsity_config")
    groups = [*(config.get("config_groups") or {}).values()]
    reader = _Reader([_scheme(group, config) for group in groups])

    def find(module: str, tensors: Tensors, value: Read) -> Published | None:
        published = reader.find(module, tensors, value)
        return published and with_inputs(published, groups, module, tensors)

    return Method("compressed-tensors", SUFFIXES, find)


def _scheme(group: object, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights' scheme of a group. Raises QuantizationError."""
    if not isinstance(group, Mapping):
        raise QuantizationError(f"compressed-tensors: the scheme {group!r} is no object")
    weights, form = group.get("weights") or {}, group.get("format") or config.get("format")
    if form != "mixed-precision":
        one_of(form, FORMATS, "compressed-tensors: format")
    one_of((weights.get("type", "int"), weights.get("num_bits")), TYPES,
           "compressed-tensors: weights of (type, num_bits)")  # fmt: skip
    return weights


class _Reader:
    """`schemes`: of all groups."""

    def __init__(self, schemes: Sequence[Mapping[str, Any]]) -> None:
        self._blocks = [scheme["block_structure"] for scheme in schemes if scheme.get("block_structure")]
        sparse = next((scheme for scheme in schemes), {})
        self._sparse = sparse.get("num_bits", 4), max(sparse.get("group_size") or 0, 0)

    def find(self, module: str, tensors: Tensors, value: Read) -> Published | None:
        if SPARSE[1] in tensors:
            return marlin.find_24(SPARSE, *self._sparse, module, tensors, value)
        if PACKED in tensors and SCALES not in tensors:
            raise QuantizationError(f"{module}{PACKED} has no weight_scale")
        if PACKED in tensors and tensors[PACKED].dtype == torch.uint8:
            return _floats(module, tensors)
        if PACKED in tensors:
            return _packed(module, tensors, value)
        weight = tensors.get(".weight")
        if weight is None or weight.dtype != torch.int8:
            return fp8.find(self._blocks, module, tensors, value)
        return _int8(module, tensors)


def _int8(module: str, tensors: Tensors) -> Published:
    if SCALES not in tensors:
        raise QuantizationError(f"{module}.weight is int8 without a weight_scale")
    shape, rows = tuple(tensors[".weight"].shape), tensors[SCALES].numel() > 1
    layout = _layout("int8", shape[1], tensors)
    cuts = {".weight": 1} | ({SCALES: 1, ZEROS: 1} if rows else {})
    return Published(layout, shape, functools.partial(_decode_int8, layout), cuts)


def _packed(module: str, tensors: Tensors, value: Read) -> Published:
    shape, columns = tuple(value(SHAPE).tolist()), tensors[PACKED].shape[1]
    bits = next((bits for _, bits in TYPES if columns == -(-shape[1] * bits // 32)), 8)
    layout = _layout(kind_of(bits), shape[1], tensors)
    # A row of zeros, packed along the outputs, is of whole weights only where words hold whole codes.
    cuts = {PACKED: 1, SCALES: 1, ZEROS: 32 // bits} if 32 % bits == 0 or ZEROS not in tensors else {}
    return Published(layout, shape, functools.partial(_decode_packed, bits, shape[1], layout), cuts)


def _floats(module: str, tensors: Tensors) -> Published | None:
    (num_out, width), groups = tensors[PACKED].shape, tensors[SCALES].shape[-1]
    is_six = GLOBAL not in tensors and width == groups * MICRO * 3 // 4
    if not is_six:
        return float4.find((PACKED, SCALES, GLOBAL), True, module, tensors)
    return Published(None, (num_out, groups * MICRO), _decode_sixes, {PACKED: 1, SCALES: 1})


def _decode_sixes(tensors: Tensors) -> Tensor:
    """Floats of a sign, two bits of exponent and three of mantissa."""
    one, two, three = tensors[PACKED].unflatten(1, (-1, 3)).to(torch.int32).unbind(-1)
    words = (one | two << 8 | three << 16).unsqueeze(-1)
    codes = (words >> torch.tensor((0, 6, 12, 18))) & 63
    exponent, mantissa = codes >> 3 & 3, codes & 7
    values = torch.where(exponent == 0, mantissa / 8, torch.ldexp(1 + mantissa / 8, exponent - 1))
    values = torch.where(codes < 32, values, -values).flatten(1)
    return values * float4.powers(tensors[SCALES]).repeat_interleave(MICRO, 1)


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
    codes = centered(unpack(tensors[PACKED], bits)[:, :num_in], bits)
    scales, zeros = tensors[SCALES], None
    if layout.has_zeros:
        zeros = unpack(tensors[ZEROS].T, bits).T.to(torch.int16)[: len(codes)] - (1 << (bits - 1))
        zeros = zeros.to(scales.dtype)
    order = torch.argsort(tensors[INDEX].long(), stable=True) if layout.has_order else None
    return Coded(codes if order is None else codes[:, order], scales, zeros, order)

