"""Linears whose weights are codes of 4 or 8 bits in rows, as kernels for GPUs read them: 16 bytes at a time.

Legend: N outputs, K inputs, G groups. Codes are words[N, W] int32 (ops/linear_codes.py), each output's padded with
codes of 0 to whole blocks of 64 bytes (4 bits) or 16 bytes (8 bits). Words of 4 bits lie transposed in each block: the
16 words (i, t), of 4 times 4, as (t, i). So the four lanes that share a row of a matrix instruction's operand, and hold
16 bytes each, have 32 neighbouring inputs in their words i: of one group. Words of 8 bits lie in order: plain numbers
of fp8 or int8, row by row. Scales and zeros are [G, N'], N' being N rounded up to 16. A lut4 brings its table of 16
float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.ops.coded import CODE_TYPES, COUNTING_UP, KINDS, TABLES, scaled
from fuseline.compile.ops.library import Make, ModelShape, Workload, batch_invariant, op
from fuseline.compile.ops.linear_codes import (
    EIGHT_BITS,
    NAMES,
    bits_of,
    from_panels,
    from_words,
    linear_codes_inputs,
    random_weight,
    to_words,
    wide,
)

ALIGNED = 16
"""Outputs to which rows of scales are rounded up."""
BLOCK = 16
"""Words that lie transposed."""
LUT4 = frozenset(KINDS[name] for name in TABLES)


def row_words(num_in: int, bits: int) -> int:
    """Words of an output."""
    whole = BLOCK if bits == 4 else 4
    return -(-num_in * bits // (32 * whole)) * whole


def to_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K], of one byte each, as words [N, W] int32."""
    words = to_words(codes, bits)
    words = F.pad(words, (0, row_words(codes.shape[-1], bits) - words.shape[-1]))
    return _transposed(words) if bits == 4 else words


def from_rows(words: Tensor, bits: int) -> Tensor:
    """[..., W] int32 -> codes [..., K] uint8, K rounded up."""
    return from_words(_transposed(words) if bits == 4 else words, bits)


def _transposed(words: Tensor) -> Tensor:
    return words.unflatten(-1, (-1, 4, 4)).transpose(-1, -2).flatten(-3).contiguous()


def values_of(words: Tensor, kind: int, table: Tensor | None, like: Tensor) -> Tensor:
    """[..., W] int32 -> the codes' values [..., K], K rounded up: in the dtype of a float64 `like`, else float32."""
    codes = from_rows(words, 8 if kind in EIGHT_BITS else 4)
    if table is not None:
        values = table.to(like.dtype).float()[codes.long()]
    elif kind in EIGHT_BITS:
        values = codes.view(CODE_TYPES[NAMES[kind]]).float()
    else:
        values = codes.float() - 8
    return values.to(wide(like))


def code_rows_inputs(make: Make) -> Iterator[tuple]:
    """Those of `linear_codes`, in rows; without kinds that no kernel for GPUs takes."""
    for x, codes, scales, zeros, order, bias, num_out, group, kind in linear_codes_inputs(make):
        if NAMES[kind] in COUNTING_UP or bits_of(NAMES[kind]) == 5:
            continue
        yield x, *_in_rows(codes, scales, zeros, num_out, x.shape[-1], kind), order, bias, group, kind


def _in_rows(codes: Tensor, scales: Tensor, zeros: Tensor | None, num_out: int, num_in: int, kind: int) -> tuple:
    """(codes, scales, zeros, table) in rows, of panels."""
    bits = 8 if kind in EIGHT_BITS else 4
    words = to_rows(from_words(from_panels(codes, num_out), bits)[:, :num_in], bits)
    lines = [None if part is None else part.permute(1, 0, 2).flatten(1).contiguous() for part in (scales, zeros)]
    table = torch.tensor(TABLES[NAMES[kind]], device=codes.device) if kind in LUT4 else None
    return words, *lines, table


def code_parts(make: Make, kind: str, group: int, num_out: int, num_in: int, has_zeros: bool = False) -> tuple:
    """(codes, scales, zeros, table) of a random weight; products with a normal x are about 1."""
    return _in_rows(*random_weight(make, kind, group, num_out, num_in, has_zeros), num_out, num_in, KINDS[kind])


def code_rows_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """The largest linear of a layer, in int4 with groups of 32, int8 with groups of 128 and fp8."""
    num_in, num_out = shape.hidden_size, 2 * shape.intermediate_size
    for name, group in (("int4", 32), ("int8", 128), ("fp8", 0)):
        bits = 4 if name == "int4" else 8
        words = torch.zeros(num_out, row_words(num_in, bits), dtype=torch.int32, device=make.device)
        scales = make.fill(-(-num_in // group) if group else 1, -(-num_out // ALIGNED) * ALIGNED)
        for tokens in make.tokens:
            args = (make.fill(1, tokens, num_in), words, scales, None, None, None, None, group, KINDS[name])
            yield Workload(f"{name} {tokens} x {num_in} -> {num_out}", args, flops=2 * tokens * num_in * num_out)


@op(
    fake=lambda x, codes, *_: x.new_empty(*x.shape[:-1], codes.shape[0]),
    inputs=code_rows_inputs,
    tolerance=24.0,
    half_tolerance=2.0,
    workloads=code_rows_workloads,
    weights=("codes", "scales", "zeros", "table", "order", "bias"),
    is_product=True,
    invariant="linear_code_rows_invariant",
)
def linear_code_rows(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, table: Tensor | None, order: Tensor | None,
    bias: Tensor | None, group: int, kind: int,
) -> Tensor:  # fmt: skip
    """x[..., K] times a weight of codes -> [..., N]; fp32, rounded once. `order`: input j of the weight is x[order[j]].

    `group` 0: all of a row. `kind`: of ops/coded.py's KINDS.
    """
    x32 = x.to(wide(x)) if order is None else x.to(wide(x))[..., order]
    values = values_of(codes, kind, table, x)[:, : x.shape[-1]]
    of_groups = (None if part is None else part[:, : len(codes)].T for part in (scales, zeros))
    weight = scaled(values, *of_groups, group, NAMES[kind])
    return F.linear(x32, weight, None if bias is None else bias.to(wide(x))).to(x.dtype)


linear_code_rows_invariant = batch_invariant(linear_code_rows)


def embedding_code_rows_inputs(make: Make) -> Iterator[tuple]:
    for name in ("int8", "int4", "nf4"):
        kind = KINDS[name]
        yield make.ids(33, 1, 6), *code_parts(make, name, 32, 33, 72, name == "int4"), 72, 32, kind


def embedding_code_rows_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """The embedding of a vocabulary in int8 with groups of 128."""
    num_in, group = shape.hidden_size, 128
    words = torch.zeros(shape.vocab_size, row_words(num_in, 8), dtype=torch.int32, device=make.device)
    scales = make.fill(-(-num_in // group), -(-shape.vocab_size // ALIGNED) * ALIGNED)
    for tokens in make.tokens:
        args = (make.ids(shape.vocab_size, 1, tokens), words, scales, None, None, num_in, group, KINDS["int8"])
        yield Workload(f"{tokens} x {num_in}", args, num_bytes=tokens * num_in)


@op(
    fake=lambda ids, codes, scales, zeros, table, num_in, group, kind: scales.new_empty(*ids.shape, num_in),
    inputs=embedding_code_rows_inputs,
    workloads=embedding_code_rows_workloads,
    weights=("codes", "scales", "zeros", "table"),
    sums=False,
)
def embedding_code_rows(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, table: Tensor | None, num_in: int, group: int,
    kind: int,
) -> Tensor:  # fmt: skip
    """The rows `ids` of a weight of codes -> [..., K], in the dtype of the scales."""
    values = values_of(codes[ids], kind, table, scales)[..., :num_in]
    of_groups = (None if part is None else part.T[ids] for part in (scales, zeros))
    return scaled(values, *of_groups, group, NAMES[kind]).to(scales.dtype)
