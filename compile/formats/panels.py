"""Packed weights: [N, K] as panels[ceil(N/16)][K][16], zero padded; experts with a leading dim.

bf16 lies in pairs of k, [ceil(N/16)][K/2][16][2] and an odd last k by itself, in storage of the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fuseline import _C  # noqa: F401  registers pack_panels
from fuseline.compile.formats.format import Call, Format, Pack, Put, Shape, Stored
from fuseline.compile.ops.linear import PANEL

aten = torch.ops.aten
OPS = torch.ops.fuseline


def panels_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the panels for a weight of this shape. Panels start as zeros: only lanes of real rows are written."""
    *lead, rows, cols = shape
    return (*lead, -(-rows // PANEL), cols, PANEL)


def pack_block(panels: Tensor, block: Tensor, row: int, col: int) -> None:
    """Write block [n, k] of the weight, whose first element is weight[row, col], into panels [P, K, 16]."""
    if block.shape[1] != panels.shape[1]:
        pack_columns(panels, block, row, col)
    elif _has_pairs(panels) and _has_pairs(block):
        put_lanes(panels.view(torch.int32).view(len(panels), -1, PANEL), block.view(torch.int32), row)
    else:
        torch.ops.fuseline_cpu.pack_panels(panels, block, row)


def _has_pairs(values: Tensor) -> bool:
    """Whether pairs of k are words of 32 bits, in panels [P, K, 16] or a block [n, K] of bf16."""
    return values.dtype == torch.bfloat16 and values.shape[1] % 2 == 0 and values.is_contiguous() and (
        values.storage_offset() % 2 == 0
    )  # fmt: skip


def pack_columns(panels: Tensor, block: Tensor, row: int, col: int = 0) -> None:
    """The same in plain torch, for blocks that hold some of the columns; also the reference of the kernel."""
    end = col + block.shape[1]
    for first, step, lanes in _planes(panels):
        begin = max(col, first)
        begin += (first - begin) % step
        stop = min(end, first + step * lanes.shape[1])
        if begin < stop:
            columns = block[:, begin - col : stop - col : step]
            at = (begin - first) // step
            pack_lanes(lanes[:, at : at + columns.shape[1]], columns, row)


def _planes(panels: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first, step, view [P, n, 16]) of panels: the view's line i is column first + i * step of the weight."""
    if panels.dtype != torch.bfloat16:
        yield 0, 1, panels
        return
    even = panels.shape[1] // 2 * 2
    pairs = panels[:, :even].unflatten(1, (even // 2, 2)).flatten(2).unflatten(2, (PANEL, 2))
    yield 0, 2, pairs[..., 0]
    yield 1, 2, pairs[..., 1]
    yield even, 1, panels[:, even:]


def put_lanes(lanes: Tensor, block: Tensor, row: int) -> None:
    """Write block [n, X], whose first line is row `row`, into panels [P, X, 16] of any dtype."""
    is_plain = lanes.is_contiguous() and block.stride(-1) == 1 and block.is_cpu
    if is_plain and lanes.dtype == block.dtype and lanes.element_size() in (2, 4):
        torch.ops.fuseline_cpu.pack_lanes(lanes.view(torch.uint8), block.view(torch.uint8), row)
    else:
        pack_lanes(lanes, block, row)


def pack_lanes(lanes: Tensor, block: Tensor, row: int) -> None:
    """The same in plain torch."""
    done = 0
    while done < len(block):
        panel, lane = divmod(row + done, PANEL)
        left = len(block) - done
        if lane == 0 and left >= PANEL:
            count = left // PANEL
            whole = lanes[panel : panel + count]
            whole.copy_(block[done : done + count * PANEL].unflatten(0, (count, PANEL)).transpose(1, 2))
            done += count * PANEL
        else:
            count = min(left, PANEL - lane)
            lanes[panel, :, lane : lane + count].copy_(block[done : done + count].T)
            done += count


def _shapes(shape: Shape, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
    return {"": (panels_shape(shape), dtype)}


def _write(stored: Stored, block: Tensor, start: Shape, put: Put) -> None:
    panels = stored[""]
    if block.ndim == 2:
        pack_block(panels, block, *start)
        return
    for expert, matrix in enumerate(block, start[0]):
        pack_block(panels[expert], matrix, *start[1:])


def _linear(args: tuple, pack: Pack) -> Call:
    x, weight, bias = args
    return OPS.linear_panels.default, (x, *pack(weight), bias, weight.meta["val"].shape[0])


def _head_linear(args: tuple, pack: Pack) -> Call:
    x, weight = args
    return OPS.head_linear_panels.default, (x, *pack(weight), weight.meta["val"].shape[1])


def _embedding(args: tuple, pack: Pack) -> Call:
    weight, ids = args[:2]
    return OPS.embedding_panels.default, (ids, *pack(weight), weight.meta["val"].shape[0])


def _experts(args: tuple, pack: Pack) -> Call:
    x, ids, weights, gate_up, down, gate_up_bias, down_bias, act, transposed, alpha, limit = args
    num_hidden = down.meta["val"].shape[1 if transposed else 2]
    packed = (*pack(gate_up, transposed), *pack(down, transposed))
    rest = (gate_up_bias, down_bias, act, num_hidden, alpha, limit)
    return OPS.experts_panels.default, (x, ids, weights, *packed, *rest)


def _expert_linear(args: tuple, pack: Pack) -> Call:
    x, ids, weight, bias, transposed = args
    num_out = weight.meta["val"].shape[2 if transposed else 1]
    return OPS.expert_linear_panels.default, (x, ids, *pack(weight, transposed), bias, num_out)


FORMAT = Format(
    "panels", _shapes, _write,
    readers={
        OPS.linear.default: _linear, OPS.experts.default: _experts, OPS.head_linear.default: _head_linear,
        OPS.expert_linear.default: _expert_linear,
        aten.embedding.default: _embedding,
    },
    targets=("cpu",), multiples=(PANEL, 1),
)  # fmt: skip
