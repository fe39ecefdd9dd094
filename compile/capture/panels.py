"""Packed weights: [N, K] as panels[ceil(N/16)][K][16], zero padded; experts with a leading dim."""

from __future__ import annotations

import torch
from torch import Tensor

from fuseline import _C  # noqa: F401  registers pack_panels

PANEL = 16


def empty_panels(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Panels for a weight of this shape, zero: only lanes of real rows are written later."""
    *lead, rows, cols = shape
    return torch.zeros(*lead, -(-rows // PANEL), cols, PANEL, dtype=dtype)


def pack_block(panels: Tensor, block: Tensor, row: int, col: int) -> None:
    """Write block [n, k] of the weight, whose first element is weight[row, col], into panels [P, K, 16]."""
    if block.shape[1] == panels.shape[1]:
        torch.ops.fuseline_cpu.pack_panels(panels, block, row)
    else:
        pack_columns(panels[:, col : col + block.shape[1]], block, row)


def pack_columns(panels: Tensor, block: Tensor, row: int) -> None:
    """The same in plain torch, for blocks that hold some of the columns; also the reference of the kernel."""
    done = 0
    while done < len(block):
        panel, lane = divmod(row + done, PANEL)
        left = len(block) - done
        if lane == 0 and left >= PANEL:
            count = left // PANEL
            lanes = panels[panel : panel + count]
            lanes.copy_(block[done : done + count * PANEL].unflatten(0, (count, PANEL)).transpose(1, 2))
            done += count * PANEL
        else:
            count = min(left, PANEL - lane)
            panels[panel, :, lane : lane + count].copy_(block[done : done + count].T)
            done += count
