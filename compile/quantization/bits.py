"""Codes of few bits in integers of 32 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """[..., W] int32 -> [..., W * 32 / bits] uint8. Value j of a word is at bits * order[j]; by default in order."""
    shifts = torch.tensor(order or range(32 // bits), dtype=torch.int32) * bits
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)


def unpack_nibbles(packed: Tensor, low_first: bool = True) -> Tensor:
    """[..., B] uint8 -> [..., 2 B] uint8."""
    halves = (packed & 15, packed >> 4) if low_first else (packed >> 4, packed & 15)
    return torch.stack(halves, -1).flatten(-2)
