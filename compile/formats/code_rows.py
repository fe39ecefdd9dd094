"""Weights of codes of 4 or 8 bits for GPUs, for all layouts of ops/coded.py: words and scales in rows.

How they lie is said in ops/code_rows.py. The parts are made from a checkpoint's codes as they are, or of plain values
by `encode`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fuseline.compile.formats.encode import encode
from fuseline.compile.formats.format import Call, Format, Pack, Shape, Stored
from fuseline.compile.ops.code_rows import ALIGNED, row_words, to_rows
from fuseline.compile.ops.coded import COUNTING_UP, KINDS, TABLES, Coded, Layout, parse_layout

aten = torch.ops.aten
OPS = torch.ops.fuseline
PREFIX = "rows/"
"""Before the layout's name in the format's."""


@functools.cache
def format_of(name: str) -> Format:
    """The format of a layout, by the layout's name. Raises ValueError for another name."""
    layout = parse_layout(name)
    return Format(
        PREFIX + name, functools.partial(_shapes, layout), layout=layout, put_coded=functools.partial(_put, layout),
        encode=functools.partial(encode, layout=layout), readers={
            OPS.linear.default: functools.partial(_linear, layout),
            aten.embedding.default: functools.partial(_embedding, layout),
        }, targets=("cuda",), multiples=(ALIGNED, max(layout.group, 128)),
    )  # fmt: skip


def has_kernel(layout: Layout, shape: Shape) -> bool:
    """Whether kernels take a weight of this layout and shape: groups of a power of two, zeros in units of codes."""
    group = layout.group
    is_even = group == 0 or (group >= 8 and group & (group - 1) == 0)
    return len(shape) == 2 and is_even and layout.kind not in COUNTING_UP


def _shapes(layout: Layout, shape: Shape, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
    num_out, num_in = shape
    of_groups = (layout.num_groups(num_in), -(-num_out // ALIGNED) * ALIGNED), getattr(torch, layout.scale_dtype)
    shapes = {"codes": ((num_out, row_words(num_in, layout.bits)), torch.int32), "scales": of_groups}
    shapes |= {"zeros": of_groups} if layout.has_zeros else {}
    shapes |= {"table": ((16,), torch.float32)} if layout.table else {}
    return shapes | ({"order": ((num_in,), torch.int64)} if layout.has_order else {})


def _put(layout: Layout, stored: Stored, coded: Coded, row: int) -> None:
    rows = slice(row, row + len(coded.codes))
    stored["codes"][rows] = to_rows(coded.codes, layout.bits).to(stored["codes"].device)
    stored["scales"][:, rows] = coded.scales.T.to(stored["scales"])
    if coded.zeros is not None:
        stored["zeros"][:, rows] = coded.zeros.T.to(stored["zeros"])
    if layout.table:
        stored["table"].copy_(torch.tensor(TABLES[layout.table]))
    if coded.order is not None:
        stored["order"].copy_(coded.order)


def _parts(layout: Layout, weight: object, pack: Pack) -> dict[str, object]:
    """Constants by part; None for those that the layout has not."""
    names = ["codes", "scales", *(["zeros"] if layout.has_zeros else []), *(["table"] if layout.table else []),
             *(["order"] if layout.has_order else [])]  # fmt: skip
    return dict.fromkeys(("zeros", "table", "order")) | dict(zip(names, pack(weight), strict=True))


def _linear(layout: Layout, args: tuple, pack: Pack) -> Call:
    x, weight, bias = args
    parts = _parts(layout, weight, pack)
    given = [parts[name] for name in ("codes", "scales", "zeros", "table", "order")]
    return OPS.linear_code_rows.default, (x, *given, bias, layout.group, KINDS[layout.code_kind])


def _embedding(layout: Layout, args: tuple, pack: Pack) -> Call | None:
    weight, ids = args[:2]
    value: Tensor = weight.meta["val"]
    if layout.has_order or str(value.dtype) != f"torch.{layout.scale_dtype}":
        return None
    parts = _parts(layout, weight, pack)
    given = [parts[name] for name in ("codes", "scales", "zeros", "table")]
    return OPS.embedding_code_rows.default, (ids, *given, value.shape[1], layout.group, KINDS[layout.code_kind])
