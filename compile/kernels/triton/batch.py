"""A step's inputs on the GPU: tokens that never left it, and padding up to the size of a captured graph.

Legend: T tokens of the step, S its sequences, P the padded number of them, G cache groups, M columns of its tables.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


def feed_tokens(token_ids: Tensor, sources: Tensor, sampled: Tensor) -> None:
    """token_ids[t] = sampled[sources[t]] where sources[T] is not negative: what the step before gave, unseen by the
    host. token_ids[T] and sampled int64, sources int32 or int64."""
    if token_ids.numel():
        grid = (triton.cdiv(token_ids.numel(), BLOCK),)
        feed_kernel[grid](token_ids, sources, sampled, token_ids.numel(), SIZE=BLOCK)


def pad_decode(padded: Mapping[str, Tensor], step: Mapping[str, Tensor], num_padded: int) -> None:
    """Copies a step of one token a sequence into the inputs of a captured graph, `num_padded` (P) rows of them.

    Both by field of StepInputs; those in `padded` are copied. Rows behind the step's are sequences without keys whose
    token is written nowhere; columns behind the step's are left as they are.
    """
    to_slots, to_tables = padded["slot_mapping"], padded["block_tables"]
    slots, tables = step["slot_mapping"], step["block_tables"]
    pad_kernel[(num_padded,)](
        *padded.values(), *(step[name] for name in padded), slots.shape[1], tables.shape[2], to_slots.stride(0),
        slots.stride(0), *to_tables.stride()[:2], *tables.stride()[:2], G=slots.shape[0], SIZE=BLOCK,
    )  # fmt: skip


def pad_tokens(padded: Mapping[str, Tensor], step: Mapping[str, Tensor], num_padded: int) -> None:
    """Copies a step's tokens into the inputs of captured segments, `num_padded` (P) of them.

    Both by field of StepInputs; those in `padded` are copied. Tokens behind the step's are written nowhere.
    """
    to_slots, slots = padded["slot_mapping"], step["slot_mapping"]
    pad_tokens_kernel[(triton.cdiv(num_padded, BLOCK),)](
        *padded.values(), *(step[name] for name in padded), slots.shape[1], num_padded, to_slots.stride(0),
        slots.stride(0), G=slots.shape[0], SIZE=BLOCK,
    )  # fmt: skip


def pad_sequences(padded: Mapping[str, Tensor], step: Mapping[str, Tensor], num_padded: int) -> None:
    """Copies a step's sequences into the inputs of a captured mixed step, `num_padded` (P) of them and rows of logits.

    Both by field of StepInputs; those in `padded` are copied. Sequences behind the step's have no tokens and no keys,
    rows of logits behind it are those of the first token; columns behind the step's are left as they are.
    """
    to_tables, tables = padded["block_tables"], step["block_tables"]
    pad_sequences_kernel[(num_padded + 1,)](
        *padded.values(), *(step[name] for name in padded), step["seq_lens"].shape[0], step["logits_rows"].shape[0],
        num_padded, tables.shape[2], *to_tables.stride()[:2], *tables.stride()[:2], G=tables.shape[0], SIZE=BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def feed_kernel(token_ids, sources, sampled, num_tokens, SIZE: tl.constexpr):
    t = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    source = tl.load(sources + t, mask=t < num_tokens, other=-1).to(tl.int64)
    tl.store(token_ids + t, tl.load(sampled + source, mask=source >= 0, other=0), mask=source >= 0)


@triton.jit
def copy_line(to_line, line, width, is_real, SIZE: tl.constexpr):
    """Copies a sequence's line of a block table; of one that pads the batch nothing is written."""
    for first in range(0, width, SIZE):
        column = first + tl.arange(0, SIZE)
        there = (column < width) & is_real
        tl.store(to_line + column, tl.load(line + column, mask=there, other=0), mask=there)


@triton.jit(
    do_not_specialize=[
        "num_rows", "width", "to_slots_stride_g", "slots_stride_g", "to_tables_stride_g", "to_tables_stride_s",
        "tables_stride_g", "tables_stride_s",
    ]
)  # fmt: skip
def pad_kernel(
    to_tokens, to_positions, to_rope_rows, to_lens, to_slots, to_tables, tokens, positions, rope_rows, lens, slots,
    tables, num_rows, width, to_slots_stride_g, slots_stride_g, to_tables_stride_g, to_tables_stride_s, tables_stride_g,
    tables_stride_s, G: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Program row."""
    r = tl.program_id(0)
    is_real = r < num_rows
    tl.store(to_tokens + r, tl.load(tokens + r, mask=is_real, other=0))
    tl.store(to_positions + r, tl.load(positions + r, mask=is_real, other=0))
    tl.store(to_rope_rows + r, tl.load(rope_rows + r, mask=is_real, other=0))
    tl.store(to_lens + r, tl.load(lens + r, mask=is_real, other=0))
    for g in tl.static_range(G):
        slot = tl.load(slots + g * slots_stride_g + r, mask=is_real, other=-1)
        tl.store(to_slots + g * to_slots_stride_g + r, slot)
        line = tables + g * tables_stride_g + r * tables_stride_s
        copy_line(to_tables + g * to_tables_stride_g + r * to_tables_stride_s, line, width, is_real, SIZE)


@triton.jit(do_not_specialize=["num_tokens", "num_padded", "to_slots_stride_g", "slots_stride_g"])
def pad_tokens_kernel(
    to_tokens, to_positions, to_rope_rows, to_slots, tokens, positions, rope_rows, slots, num_tokens, num_padded,
    to_slots_stride_g, slots_stride_g, G: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Program SIZE tokens."""
    t = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    is_real, there = t < num_tokens, t < num_padded
    tl.store(to_tokens + t, tl.load(tokens + t, mask=is_real, other=0), mask=there)
    tl.store(to_positions + t, tl.load(positions + t, mask=is_real, other=0), mask=there)
    tl.store(to_rope_rows + t, tl.load(rope_rows + t, mask=is_real, other=0), mask=there)
    for g in tl.static_range(G):
        slot = tl.load(slots + g * slots_stride_g + t, mask=is_real, other=-1)
        tl.store(to_slots + g * to_slots_stride_g + t, slot, mask=there)


@triton.jit(
    do_not_specialize=[
        "num_seqs", "num_rows", "num_padded", "width", "to_tables_stride_g", "to_tables_stride_s", "tables_stride_g",
        "tables_stride_s",
    ]
)  # fmt: skip
def pad_sequences_kernel(
    to_starts, to_lens, to_rows, to_tables, starts, lens, rows, tables, num_seqs, num_rows, num_padded, width,
    to_tables_stride_g, to_tables_stride_s, tables_stride_g, tables_stride_s, G: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Program sequence, and one for where the last ends."""
    s = tl.program_id(0)
    tl.store(to_starts + s, tl.load(starts + tl.minimum(s, num_seqs)))
    if s == num_padded:
        return
    is_real = s < num_seqs
    tl.store(to_lens + s, tl.load(lens + s, mask=is_real, other=0))
    tl.store(to_rows + s, tl.load(rows + s, mask=s < num_rows, other=0))
    for g in tl.static_range(G):
        line = tables + g * tables_stride_g + s * tables_stride_s
        copy_line(to_tables + g * to_tables_stride_g + s * to_tables_stride_s, line, width, is_real, SIZE)
