"""Weights of codes of 4, 5 or 8 bits, for all layouts of ops/coded.py: words, scales and zeros in panels of 16 outputs.

`linear_codes` and `experts_codes` read them, `linear_codes_int8` where inputs are quantized too, and `embedding_codes`.
The parts of a weight are made from a checkpoint's codes as they are, or of plain values by `encode`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fuseline.compile.formats.encode import encode
from fuseline.compile.formats.format import Call, Format, Pack, Shape, Stored
from fuseline.compile.formats.panels import put_lanes
from fuseline.compile.ops.coded import KINDS, OFFSETS, STATIC, Coded, Layout, parse_layout
from fuseline.compile.ops.linear_codes import PANEL, bits_of, num_words

aten = torch.ops.aten
OPS = torch.ops.fuseline
DEPTH = 512
"""Inputs that kernels multiply at a time (kDepth of product.h): groups must divide it."""
MAX_EXACT = 1 << 16
"""Inputs whose products of int8 numbers an int32 holds the sum of."""


@functools.cache
def format_of(name: str) -> Format:
    """The format of a layout, by the layout's name. Raises ValueError for another name."""
    layout = parse_layout(name)
    return Format(
        name, functools.partial(_shapes, layout), layout=layout, put_coded=functools.partial(_put, layout),
        encode=functools.partial(encode, layout=layout), readers={
            OPS.linear.default: functools.partial(_linear, layout),
            OPS.experts.default: _experts,
            aten.embedding.default: functools.partial(_embedding, layout),
        }, targets=("cpu",), multiples=(PANEL, max(layout.group, 8)),
    )  # fmt: skip


def has_kernel(layout: Layout, shape: Shape) -> bool:
    """Whether kernels take a weight of this layout and shape: a matrix, or one for each expert."""
    if layout.activations and (not layout.is_integer or shape[-1] > MAX_EXACT):
        return False
    is_even = layout.group == 0 or (layout.group % 8 == 0 and DEPTH % layout.group == 0)
    return len(shape) in (2, 3) and is_even


def _shapes(layout: Layout, shape: Shape, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
    *lead, num_out, num_in = shape
    panels, scale = -(-num_out // PANEL), getattr(torch, layout.scale_dtype)
    of_groups = (*lead, panels, layout.num_groups(num_in), PANEL), scale
    words = num_words(num_in, bits_of(layout.packed_kind))
    shapes = {"codes": ((*lead, panels, words, PANEL), torch.int32), "scales": of_groups}
    shapes |= {"zeros": of_groups} if layout.has_zeros else {}
    shapes |= {"order": ((*lead, num_in), torch.int64)} if layout.has_order else {}
    return shapes | ({"input_scale": ((1,), torch.float32)} if layout.activations == STATIC and not lead else {})


def _put(layout: Layout, stored: Stored, coded: Coded, row: int) -> None:
    codes = coded.codes.view(torch.uint8)
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    codes = codes + OFFSETS["int5"] if layout.packed_kind == "int5" else codes
    torch.ops.fuseline_cpu.pack_codes(stored["codes"], codes, row, bits_of(layout.packed_kind))
    put_lanes(stored["scales"], coded.scales, row)
    if coded.zeros is not None:
        put_lanes(stored["zeros"], coded.zeros, row)
    if coded.order is not None:
        stored["order"].copy_(coded.order)
    if coded.input_scale is not None and "input_scale" in stored:
        stored["input_scale"].copy_(coded.input_scale)


def _linear(layout: Layout, args: tuple, pack: Pack) -> Call:
    x, weight, bias = args
    parts = _parts(layout, weight, pack(weight))
    stored = x, *(parts.get(part) for part in ("codes", "scales", "zeros", "order")), bias
    numbers = weight.meta["val"].shape[0], *_numbers(layout)
    if layout.activations:
        return OPS.linear_codes_int8.default, (*stored, parts.get("input_scale"), *numbers)
    return OPS.linear_codes.default, (*stored, *numbers)


def _experts(args: tuple, pack: Pack) -> Call:
    """gate_up and down may be of two layouts."""
    x, ids, weights, gate_up, down, gate_up_bias, down_bias, act, transposed, alpha, limit = args
    parts, numbers = [], []
    for weight in (gate_up, down):
        stored = pack(weight, transposed)
        layout = parse_layout(stored[0].meta["weight"].format)
        found = _parts(layout, weight, stored)
        parts += [found.get(part) for part in ("codes", "scales", "zeros", "order")]
        numbers += _numbers(layout)
    num_hidden = down.meta["val"].shape[1 if transposed else 2]
    rest = (gate_up_bias, down_bias, act, num_hidden, *numbers, alpha, limit)
    return OPS.experts_codes.default, (x, ids, weights, *parts, *rest)


def _embedding(layout: Layout, args: tuple, pack: Pack) -> Call | None:
    weight, ids = args[:2]
    value: Tensor = weight.meta["val"]
    if layout.has_order:
        return None
    parts = _parts(layout, weight, pack(weight))
    stored = (parts.get(part) for part in ("codes", "scales", "zeros"))
    return OPS.embedding_codes.default, (ids, *stored, value.shape[1], *_numbers(layout), value.dtype)


def _parts(layout: Layout, weight: fx.Node, stored: Sequence[fx.Node]) -> dict[str, fx.Node]:
    """Constants of the weight by part."""
    value: Tensor = weight.meta["val"]
    return dict(zip(_shapes(layout, tuple(value.shape), value.dtype), stored, strict=True))


def _numbers(layout: Layout) -> tuple[int, int]:
    return layout.group, KINDS[layout.packed_kind]
