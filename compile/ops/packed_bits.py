"""Codes of 1, 2 or 4 bits in bytes, as checkpoints pack them."""

from __future__ import annotations

import torch
from torch import Tensor

from fuseline import _C  # noqa: F401  registers unpack_codes


def unpack_bytes(packed: Tensor, bits: int, run: int = 1) -> Tensor:
    """[..., B] uint8 -> [..., B * 8 / bits] uint8; bits 1, 2 or 4.

    Of each run of bytes the lowest bits of all come first, then those above; B is a multiple of `run`.
    """
    codes = torch.empty(*packed.shape[:-1], packed.shape[-1] * 8 // bits, dtype=torch.uint8)
    rows = packed.reshape(-1, packed.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    torch.ops.fuseline_cpu.unpack_codes(codes.view(len(rows), -1), rows, bits, run)
    return codes
