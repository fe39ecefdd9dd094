"""Linears whose weights are codes (ops/code_rows.py) on CUDA: codes become numbers in registers, then matrix operands.

Up to 16 rows read the weight once, at memory's speed; of more rows each tile of outputs decodes its part of the weight
for a tile of rows. Above DENSE rows the weight is decoded once, a part at a time that stays in the second-level cache,
for torch's products.

Legend: M rows, N outputs, K inputs, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fuseline.compile.kernels.registry import TRITON, Implementation, tunings
from fuseline.compile.kernels.triton.code_values import load_of_groups, load_weight
from fuseline.compile.kernels.triton.matmul import GROUP as TILES_TOGETHER
from fuseline.compile.kernels.triton.matmul import grid, rows_of
from fuseline.compile.kernels.triton.tile import Tile
from fuseline.compile.kernels.triton.tiles import grouped
from fuseline.compile.ops.linear_codes import EIGHT_BITS

FEW_ROWS = 16
DENSE = 512
"""Rows above which a weight is decoded once: 40 us for an 8B model's largest, by estimate, cost less than the lower
rate of products that decode."""
DECODED_BYTES = 32 << 20
"""Of a weight decoded at a time: an H200's second-level cache holds 50 MB."""
LOW = Tile(16, 32, 128, 4, 4)
HIGH = Tile(64, 128, 128, 8, 3)
TILES = (Tile(16, 64, 128, 4, 4), Tile(32, 64, 128, 4, 4), Tile(64, 64, 128, 4, 3), Tile(128, 128, 128, 8, 3))
"""Candidates beside LOW and HIGH."""


def linear_code_rows(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, table: Tensor | None, order: Tensor | None,
    bias: Tensor | None, group: int, kind: int, *, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """x[..., K] times a weight of codes [N, W] -> [..., N]; float32 sums, rounded once with scale and bias."""
    out = x.new_empty(*x.shape[:-1], codes.shape[0])
    if out.numel() == 0:
        return out
    num_out, num_in = out.shape[-1], x.shape[-1]
    rows, stride = rows_of(x if order is None else x.index_select(-1, order))
    tile = tile or (LOW if rows.shape[0] <= FEW_ROWS else HIGH)
    words = _elements(codes, kind)
    codes_kernel[grid(rows, num_out, tile)](
        out, rows, words, scales, zeros, table, bias, rows.shape[0], stride, words.stride(0), scales.stride(0),
        N=num_out, K=num_in, G=scales.shape[0], GROUP=group, KIND=kind, TOGETHER=TILES_TOGETHER, **tile.constants(),
    )  # fmt: skip
    return out


def linear_code_rows_invariant(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, table: Tensor | None, order: Tensor | None,
    bias: Tensor | None, group: int, kind: int,
) -> Tensor:  # fmt: skip
    """`linear_code_rows` with one tile for any number of rows."""
    return linear_code_rows(x, codes, scales, zeros, table, order, bias, group, kind, tile=HIGH)


def linear_decoded(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, table: Tensor | None, order: Tensor | None,
    bias: Tensor | None, group: int, kind: int,
) -> Tensor:  # fmt: skip
    """`linear_code_rows` by torch's products with the decoded weight, some outputs at a time."""
    num_out, num_in = codes.shape[0], x.shape[-1]
    out = x.new_empty(*x.shape[:-1], num_out)
    if out.numel() == 0:
        return out
    rows = (x if order is None else x.index_select(-1, order)).reshape(-1, num_in)
    step = max(1, DECODED_BYTES // (num_in * x.element_size() * 128)) * 128
    scratch = x.new_empty(min(step, num_out), num_in)
    for begin in range(0, num_out, step):
        weight = scratch[: min(step, num_out - begin)]
        decode(weight, codes, scales, zeros, table, begin, group, kind)
        to = out.view(-1, num_out)[:, begin : begin + len(weight)]
        to.copy_(F.linear(rows, weight, None if bias is None else bias[begin : begin + len(weight)]))
    return out


def decode(
    out: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, table: Tensor | None, begin: int, group: int,
    kind: int,
) -> None:  # fmt: skip
    """Writes outputs [begin, begin + n) of a weight of codes to out[n, K]."""
    num_rows, num_in = out.shape
    words = _elements(codes, kind)
    grid = (triton.cdiv(num_rows, 32), triton.cdiv(num_in, 128))
    unpack_kernel[grid](
        out, words, scales, zeros, table, begin, num_rows, words.stride(0), scales.stride(0), K=num_in,
        G=scales.shape[0], GROUP=group, KIND=kind, ROWS=32, DEPTH=128,
    )  # fmt: skip


def embedding_code_rows(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, table: Tensor | None, num_in: int, group: int,
    kind: int,
) -> Tensor:  # fmt: skip
    """The rows `ids` of a weight of codes -> [..., K], in the dtype of the scales."""
    out = scales.new_empty(*ids.shape, num_in)
    if out.numel():
        words = _elements(codes, kind)
        embed_kernel[(ids.numel(), triton.cdiv(num_in, 128))](
            out, ids.reshape(-1), words, scales, zeros, table, words.stride(0), scales.stride(0), K=num_in,
            G=scales.shape[0], GROUP=group, KIND=kind, DEPTH=128, num_warps=1,
        )  # fmt: skip
    return out


def _elements(codes: Tensor, kind: int) -> Tensor:
    """Bytes of 8-bit codes, else words."""
    return codes.view(torch.uint8) if kind in EIGHT_BITS else codes


@triton.jit(do_not_specialize=["num_rows"])
def codes_kernel(
    out, x, codes, scales, zeros, table, bias, num_rows, x_stride, code_stride, scale_stride, N: tl.constexpr,
    K: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Program: every num_programs-th tile."""
    across = tl.cdiv(N, COLUMNS)
    down = tl.cdiv(num_rows, ROWS)
    for tile in range(tl.program_id(0), across * down, tl.num_programs(0)):
        of_rows, of_columns = grouped(tile, down, across, TOGETHER)
        row = of_rows * ROWS + tl.arange(0, ROWS)
        column = of_columns * COLUMNS + tl.arange(0, COLUMNS)
        is_row, is_column = row < num_rows, column < N
        a_line = x + row.to(tl.int64)[:, None] * x_stride
        line = column.to(tl.int64) * code_stride
        y = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, K, DEPTH):
            k = first + tl.arange(0, DEPTH)
            is_input = is_row[:, None] if K % DEPTH == 0 else is_row[:, None] & (k < K)[None, :]
            a = tl.load(a_line + k[None, :], mask=is_input, other=0.0)
            w = load_weight(codes, scales, zeros, table, line, column, is_column, first, scale_stride,
                            x.dtype.element_ty, K, G, DEPTH, GROUP, KIND)  # fmt: skip
            y = tl.dot(a, tl.trans(w), y, input_precision="ieee")
        if GROUP == 0:
            y *= tl.load(scales + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            y += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        to = out + row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["begin", "num_rows"])
def unpack_kernel(
    out, codes, scales, zeros, table, begin, num_rows, code_stride, scale_stride, K: tl.constexpr, G: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (ROWS outputs, DEPTH inputs)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * DEPTH
    _decode(out, codes, scales, zeros, table, begin + row, row, row < num_rows, first, code_stride, scale_stride, K, G,
            GROUP, KIND, DEPTH)  # fmt: skip


@triton.jit
def embed_kernel(
    out, ids, codes, scales, zeros, table, code_stride, scale_stride, K: tl.constexpr, G: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (picked row, DEPTH inputs)."""
    row = tl.program_id(0) + tl.arange(0, 1)
    output = tl.load(ids + row).to(tl.int64)
    _decode(out, codes, scales, zeros, table, output, row, row >= 0, tl.program_id(1) * DEPTH, code_stride,
            scale_stride, K, G, GROUP, KIND, DEPTH)  # fmt: skip


@triton.jit
def _decode(
    out, codes, scales, zeros, table, output, row, there, first, code_stride, scale_stride, K: tl.constexpr,
    G: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Inputs first .. first + DEPTH - 1 of the weight's outputs to rows of out[..., K]."""
    line = output.to(tl.int64) * code_stride
    value = load_weight(codes, scales, zeros, table, line, output, there, first, scale_stride, tl.float32, K, G, DEPTH,
                        GROUP, KIND)  # fmt: skip
    if GROUP == 0:
        value *= load_of_groups(scales, output, there, first, scale_stride, GROUP, DEPTH, G)
    k = first + tl.arange(0, DEPTH)
    to = out + row.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=there[:, None] & (k < K)[None, :])


IMPLEMENTATIONS = (
    Implementation(
        "linear_code_rows", "triton.linear_code_rows", "cuda", linear_code_rows, max_rows=DENSE,
        tunings=tunings("tile", TILES),
    ),
    Implementation("linear_code_rows", "triton.decode, torch.linear", "cuda", linear_decoded, order=TRITON + 1),
    Implementation("linear_code_rows_invariant", "triton.linear_code_rows_invariant", "cuda",
                   linear_code_rows_invariant),
    Implementation("embedding_code_rows", "triton.embedding_code_rows", "cuda", embedding_code_rows),
)  # fmt: skip
