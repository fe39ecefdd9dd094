"""AWQ checkpoints (AutoAWQ, version GEMM): 4 bits, a scale and a zero a group.

    qweight[K, N / 8], qzeros[G, N / 8] int32: the outputs of a word in the order of ORDER      scales[G, N]
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization.bits import unpack
from fuseline.compile.quantization.published import Method, Published, Read, Tensors, dtype_name, one_of

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble of a word that holds its j-th output."""


def read(config: Mapping[str, Any]) -> Method:
    one_of(config.get("bits", config.get("w_bit", 4)), (4,), "awq: bits")
    one_of(str(config.get("version", "gemm")).lower(), ("gemm",), "awq: version")
    group = config.get("group_size", config.get("q_group_size", 128))
    has_zeros = config.get("zero_point", True)
    return Method("awq", (".qweight", ".qzeros", ".scales"), functools.partial(_find, max(group, 0), has_zeros))


def _find(group: int, has_zeros: bool, module: str, tensors: Tensors, value: Read) -> Published | None:
    if ".qweight" not in tensors:
        return None
    num_in, words = tensors[".qweight"].shape
    layout = Layout("int4", group, dtype_name(tensors[".scales"]), has_zeros)
    return Published(layout, (words * 8, num_in), functools.partial(_decode, has_zeros))


def _decode(has_zeros: bool, tensors: Tensors) -> Coded:
    codes = unpack(tensors[".qweight"], 4, ORDER).T
    scales = tensors[".scales"].T
    if not has_zeros:
        return Coded(codes, scales)
    zeros = unpack(tensors[".qzeros"], 4, ORDER).to(torch.int16).T - 8
    return Coded(codes, scales, zeros.to(scales.dtype))
