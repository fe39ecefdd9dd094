"""bitsandbytes checkpoints.

    4 bits   weight[N * K / 2, 1] uint8: two codes a byte, the first in the high half;
             weight.absmax[blocks], float32 or, nested, codes of another quantization;
             weight.quant_map[16], weight.quant_state.bitsandbytes__nf4 (or fp4): JSON in bytes
    8 bits   weight[N, K] int8, SCB[N] float32: the largest of each output, which code 127 stands for
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization.bits import unpack_nibbles
from fuseline.compile.quantization.published import Method, Published, QuantizationError, Read, Tensors

STATE = ".weight.quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
SUFFIXES = (
    ".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map", ".SCB",
    ".weight_format", *(STATE + kind for kind in KINDS),
)  # fmt: skip


def read(config: Mapping[str, Any]) -> Method:
    return Method("bitsandbytes", SUFFIXES, _find)


def _find(module: str, tensors: Tensors, value: Read) -> Published | None:
    if ".SCB" in tensors:
        shape = tuple(tensors[".weight"].shape)
        return Published(Layout("int8", 0, "float32"), shape, _decode_int8, {".weight": 1, ".SCB": 1})
    kind = next((kind for kind in KINDS if STATE + kind in tensors), None)
    if kind is None:
        return None
    state = json.loads(bytes(value(STATE + kind).tolist()))
    (num_out, num_in), block = state["shape"], state["blocksize"]
    if num_in % block:
        raise QuantizationError(f"{module}.weight has {num_in} inputs, which blocks of {block} do not divide")
    layout = Layout("lut4", block, "float32", table=kind)
    return Published(layout, (num_out, num_in), functools.partial(_decode_4bit, (num_out, num_in), state))


def _decode_int8(tensors: Tensors) -> Coded:
    return Coded(tensors[".weight"], tensors[".SCB"].float().unsqueeze(1) / 127)


def _decode_4bit(shape: tuple[int, int], state: Mapping[str, Any], tensors: Tensors) -> Coded:
    codes = unpack_nibbles(tensors[".weight"].flatten(), low_first=False).view(shape)
    return Coded(codes, _absmax(state, tensors).view(shape[0], -1))


def _absmax(state: Mapping[str, Any], tensors: Tensors) -> Tensor:
    absmax = tensors[".weight.absmax"]
    if absmax.dtype != torch.uint8:
        return absmax.float()
    scales = tensors[".weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(absmax)]
    return tensors[".weight.nested_quant_map"][absmax.long()] * scales + state["nested_offset"]
