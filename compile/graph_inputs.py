"""Batch metadata of one step: the inputs of every compiled graph (DESIGN contract 6).

Legend: T tokens in the step, S sequences in the step, R rows whose logits are wanted, G cache groups,
M blocks in the longest table of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class GraphInputs:
    """CPU tensors, contiguous. Sequences lie one after the other in the token dimension.

    A token's key and value go to slot = block * block_size + offset; a slot of -1 writes nothing.
    """

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    rope_rows: torch.Tensor  # [T] int64, == positions unless the model has a RopeSwitchSpec
    query_start: torch.Tensor  # [S + 1] int32, first token of each sequence; query_start[S] == T
    seq_lens: torch.Tensor  # [S] int32, tokens computed once this step is done (past + this step's)
    slot_mapping: torch.Tensor  # [G, T] int64
    block_tables: torch.Tensor  # [G, S, M] int32; blocks a window has left behind may hold any valid id
    logits_rows: torch.Tensor  # [R] int64, indices into T
    state_slots: torch.Tensor | None = None  # [S] int64, for a StateSpec; a state at position 0 begins as zero
    embed_rows: torch.Tensor | None = None  # [E] int64, indices into T: positions that are fed by embeddings
    embeds: torch.Tensor | None = None  # [E, hidden size] float32

    def tensors(self) -> dict[str, torch.Tensor]:
        """The inputs that are there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


@dataclass(frozen=True)
class BlockCopy:
    """Blocks of the caches on their way to host memory or back, before a step computes."""

    is_out: bool
    """From the device to the host."""
    pairs: tuple[np.ndarray, ...]
    """By cache group: [2, N] int64, blocks of the device's caches and of the host's."""
