"""Codes of few bits in integers of 32 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.ops.packed_bits import unpack_bytes


def unpack(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """[..., W] int32 -> [..., W * 32 / bits] uint8. Value j of a word is at bits * order[j]; by default in order.

    Where `bits` does not divide 32, values follow each other without a gap, over the ends of words (3 bits of GPTQ).
    """
    if 32 % bits:
        return _unpack_stream(words, bits)
    packed = words.contiguous().view(torch.uint8)
    codes = packed if bits == 8 else unpack_bytes(packed, bits)
    return codes if order is None else codes.unflatten(-1, (-1, 32 // bits))[..., order].flatten(-2)


def _unpack_stream(words: Tensor, bits: int) -> Tensor:
    """32 values in `bits` words, the last of which may be left out."""
    words = F.pad(words, (0, -words.shape[-1] % bits))
    parts = F.pad(words.unflatten(-1, (-1, bits)).long() & 0xFFFFFFFF, (0, 1))
    starts = torch.arange(32) * bits
    word, shift = starts // 32, starts % 32
    values = (parts[..., word] >> shift) | (parts[..., word + 1] << (32 - shift))
    return (values & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)


def unpack_nibbles(packed: Tensor, low_first: bool = True) -> Tensor:
    """[..., B] uint8 -> [..., 2 B] uint8."""
    return unpack_bytes(packed if low_first else packed << 4 | packed >> 4, 4)


def kind_of(bits: int) -> str:
    """The kind of layout that holds integers of so many bits."""
    return "int4" if bits <= 4 else "int8"


def centered(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes that stand for code - 2^(bits - 1), as the codes of that kind."""
    half = 1 << (bits - 1)
    if bits == 4:
        return codes
    return codes + (8 - half) if bits < 4 else (codes - half).view(torch.int8)  # of 8 bits, it wraps around
