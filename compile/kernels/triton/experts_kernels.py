"""The kernels of experts.py, in the order they run. A pair is token * K + k; a row is its place in the sorted order.

Legend: T tokens, K (TOP_K) experts of a token, E experts, D features, I (HIDDEN) hidden size of an expert. ACT is the
code of the gate's activation, None for gpt-oss's way to combine gate and up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fuseline.compile.kernels.triton.activation import activate, sigmoid
from fuseline.compile.kernels.triton.lines import rounded
from fuseline.compile.kernels.triton.tiles import in_groups, owner_of_tile

GROUP = tl.constexpr(16)  # tiles that go over the columns together


@triton.jit(do_not_specialize=["num_pairs", "starts"])
def sort_kernel(order, starts, ids, num_pairs, CHUNK: tl.constexpr):
    """Program expert: its pairs, lowest first, to order[starts[expert]...]; the last one writes starts[E] too."""
    expert = tl.program_id(0)
    place = tl.sum(tl.zeros([CHUNK], tl.int32), 0)
    for first in range(0, num_pairs, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        id = tl.load(ids + pair, mask=pair < num_pairs, other=-1)
        place += tl.sum(((id >= 0) & (id < expert)).to(tl.int32), 0)
    tl.store(starts + expert, place)
    for first in range(0, num_pairs, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        is_here = (tl.load(ids + pair, mask=pair < num_pairs, other=-1) == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(is_here, 0) - 1, pair, mask=is_here > 0)
        place += tl.sum(is_here, 0)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts + expert + 1, place)


@triton.jit(do_not_specialize=["starts"])
def gate_up_kernel(
    hidden, x, order, starts, weight, bias, x_stride_t, stride_e, stride_n, stride_k, alpha, limit, ACT: tl.constexpr,
    TOP_K: tl.constexpr, E: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (tile, COLUMNS of I): hidden[row] = act(gate) * up of the row's token."""
    tile, part = in_groups(GROUP)
    expert, row, there = _rows_of_tile(starts, tile, E, ROWS)
    if expert < 0:
        return
    token = tl.load(order + row, mask=there, other=0) // TOP_K
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    source = x + token.to(tl.int64)[:, None] * x_stride_t
    weight += expert.to(tl.int64) * stride_e
    if ACT is None:
        gate_at, up_at = 2 * column, 2 * column + 1
        # Gates and ups are neighbours: loaded together, else each load would take every other number.
        joined = 2 * part * COLUMNS + tl.arange(0, 2 * COLUMNS)
        both = tl.zeros([ROWS, 2 * COLUMNS], tl.float32)
        for first in range(0, D, DEPTH):
            k = first + tl.arange(0, DEPTH)
            a = tl.load(source + k[None, :], mask=there[:, None] & (k < D)[None, :], other=0.0)
            w = tl.load(weight + joined[None, :] * stride_n + k[:, None] * stride_k,
                        mask=(k < D)[:, None] & (joined < 2 * HIDDEN)[None, :], other=0.0)  # fmt: skip
            both = tl.dot(a, w, both, input_precision="ieee")
        gate, up = tl.split(tl.reshape(both, [ROWS, COLUMNS, 2]))
    else:
        gate_at, up_at = column, column + HIDDEN
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, D, DEPTH):
            k = first + tl.arange(0, DEPTH)
            a = tl.load(source + k[None, :], mask=there[:, None] & (k < D)[None, :], other=0.0)
            is_weight = (k < D)[:, None] & (column < HIDDEN)[None, :]
            g = tl.load(weight + gate_at[None, :] * stride_n + k[:, None] * stride_k, mask=is_weight, other=0.0)
            u = tl.load(weight + up_at[None, :] * stride_n + k[:, None] * stride_k, mask=is_weight, other=0.0)
            gate = tl.dot(a, g, gate, input_precision="ieee")
            up = tl.dot(a, u, up, input_precision="ieee")
    dtype: tl.constexpr = hidden.dtype.element_ty
    gate, up = rounded(gate, dtype), rounded(up, dtype)
    if bias is not None:
        bias += expert * 2 * HIDDEN
        gate = rounded(gate + tl.load(bias + gate_at, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :], dtype)
        up = rounded(up + tl.load(bias + up_at, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :], dtype)
    y = _gated(gate, up, alpha, limit, ACT, dtype)
    to = hidden + row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    tl.store(to, y.to(dtype), mask=there[:, None] & (column < HIDDEN)[None, :])


@triton.jit(do_not_specialize=["starts"])
def down_kernel(
    parts, hidden, order, starts, weight, bias, scores, stride_e, stride_n, stride_k, E: tl.constexpr, D: tl.constexpr,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (tile, COLUMNS of D): parts[pair] = the expert's answer times its score."""
    tile, part = in_groups(GROUP)
    expert, row, there = _rows_of_tile(starts, tile, E, ROWS)
    if expert < 0:
        return
    pair = tl.load(order + row, mask=there, other=0)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    source = hidden + row.to(tl.int64)[:, None] * HIDDEN
    weight += expert.to(tl.int64) * stride_e
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, HIDDEN, DEPTH):
        k = first + tl.arange(0, DEPTH)
        a = tl.load(source + k[None, :], mask=there[:, None] & (k < HIDDEN)[None, :], other=0.0)
        w = tl.load(weight + column[None, :] * stride_n + k[:, None] * stride_k,
                    mask=(k < HIDDEN)[:, None] & (column < D)[None, :], other=0.0)  # fmt: skip
        y = tl.dot(a, w, y, input_precision="ieee")
    dtype: tl.constexpr = parts.dtype.element_ty
    y = rounded(y, dtype)
    if bias is not None:
        line = tl.load(bias + expert * D + column, mask=column < D, other=0.0).to(tl.float32)
        y = rounded(y + line[None, :], dtype)
    score = rounded(tl.load(scores + pair, mask=there, other=0.0).to(tl.float32), dtype)
    to = parts + pair.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(to, (y * score[:, None]).to(dtype), mask=there[:, None] & (column < D)[None, :])


@triton.jit
def combine_kernel(
    out, parts, ids, TOP_K: tl.constexpr, E: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (token, BLOCK features): the sum of its pairs in their order, rounded once."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        id = tl.load(ids + token * TOP_K + k)
        is_expert = (id >= 0) & (id < E)
        part = tl.load(parts + (token * TOP_K + k) * D + column, mask=(column < D) & is_expert, other=0.0)
        total += part.to(tl.float32)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def _rows_of_tile(starts, tile, E: tl.constexpr, ROWS: tl.constexpr):
    """(expert, rows [ROWS], which are there) of a tile; expert -1 where a tile was left room for only."""
    expert, first_tile = owner_of_tile(starts, tile, E, ROWS)
    row = tl.load(starts + expert) + (tile - first_tile) * ROWS + tl.arange(0, ROWS)
    end = tl.load(starts + expert + 1)
    has_rows = tl.load(starts + expert) + (tile - first_tile) * ROWS < end
    return tl.where(has_rows, expert, -1), row, row < end


@triton.jit
def _gated(gate, up, alpha, limit, ACT: tl.constexpr, dtype: tl.constexpr):
    """float32 of `dtype`'s numbers; each step is rounded as the reference's ops are."""
    if ACT is None:
        gate = rounded(tl.minimum(gate, limit), dtype)
        up = rounded(tl.maximum(tl.minimum(up, limit), -limit), dtype)
        glow = rounded(gate * rounded(sigmoid(rounded(gate * alpha, dtype)), dtype), dtype)
        return rounded(up + 1.0, dtype) * glow
    else:
        return rounded(activate(gate, ACT), dtype) * up
