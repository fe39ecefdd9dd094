"""QQQ checkpoints (Zhang et al.): weights of 4 bits, which the kernels widen to int8 for activations of int8.

    B[K / 16, 16 N / 8] int32: tiles as in marlin.py, of another order
    s_channel[1, N] float32, s_group[G, N] float16 (empty where a scale is a whole row's), both permuted as Marlin's

A scale a row: code * 16 is the int8, which s_channel scales. Groups: round((code - 8) * s_group) is the int8, so that
layout int8 has their integers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization.bits import unpack
from fuseline.compile.quantization.marlin import TILE, check_shapes, scales_of, untiled, weight_order
from fuseline.compile.quantization.published import Method, Published, Read, Tensors, one_of

ROWS = (0, 1, 2, 3)
OF_ROW = (4, 0, 5, 1, 6, 2, 7, 3)
OF_GROUPS = (0, 2, 4, 6, 1, 3, 5, 7)


def read(config: Mapping[str, Any]) -> Method:
    one_of(config.get("wbits", config.get("bits", 4)), (4,), "qqq: wbits")
    return Method("qqq", (".B", ".s_channel", ".s_group", ".workspace"), _find)


def _find(module: str, tensors: Tensors, value: Read) -> Published | None:
    if ".B" not in tensors:
        return None
    rows, words = tensors[".B"].shape
    num_in, num_out = rows * TILE, words * 8 // TILE
    check_shapes(module, num_out, tensors[".s_channel"], 1)
    groups = tensors[".s_group"] if ".s_group" in tensors and tensors[".s_group"].numel() else None
    if groups is None:
        return Published(Layout("int4", 0, "float32"), (num_out, num_in), _decode_rows)
    check_shapes(module, num_out, groups, len(groups))
    return Published(Layout("int8", 0, "float32"), (num_out, num_in), functools.partial(_decode_groups, num_in))


def _decode_rows(tensors: Tensors) -> Coded:
    codes = untiled(unpack(tensors[".B"], 4), weight_order(OF_ROW, ROWS, 4)).T
    scales = scales_of(tensors[".s_channel"]).T
    return Coded(codes ^ 8, scales.float() * 16)


def _decode_groups(num_in: int, tensors: Tensors) -> Coded:
    codes = untiled(unpack(tensors[".B"], 4), weight_order(OF_GROUPS, ROWS, 4)).T
    groups = scales_of(tensors[".s_group"]).T.half()
    wide = (codes.half() - 8) * groups.repeat_interleave(num_in // groups.shape[1], 1)
    return Coded(wide.round().clamp(-128, 127).to(torch.int8), scales_of(tensors[".s_channel"]).T.float())
