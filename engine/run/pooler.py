"""Pooled vectors: one of a whole sequence, from the hidden states of its positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fuseline.engine.run.device import Device
from fuseline.engine.state.rows import RequestRows
from fuseline.engine.state.scheduled_batch import ScheduledBatch


@dataclass(frozen=True)
class _Part:
    """Positions of one sequence in a step."""

    row: int
    begin: int
    end: int
    """Tokens of the step."""
    is_first: bool
    is_mean: bool
    length: int
    """Tokens of the sequence when this is its last part, else 0."""
    normalize: bool


@dataclass(frozen=True)
class PoolArguments:
    parts: list[_Part]


class Pooler:
    """A mean over a prompt that several steps compute is summed up on the device."""

    def __init__(self, rows: RequestRows, device: Device, hidden_size: int) -> None:
        self._rows, self._device = rows, device
        self.hidden_size = hidden_size
        self._sums: Tensor | None = None  # [R, H] float32, made by the first mean

    def prepare(self, batch: ScheduledBatch) -> PoolArguments | None:
        """Which positions of the step are pooled; None without any."""
        if not self._rows.num_pooled:
            return None
        is_pooled = self._rows.is_pooled[batch.rows]
        ends = np.cumsum(batch.num_new)
        parts = [self._part(batch, i, int(ends[i])) for i in np.flatnonzero(is_pooled).tolist()]
        return PoolArguments(parts) if parts else None

    def launch(self, hidden: Tensor, arguments: PoolArguments) -> Tensor | None:
        """hidden [T, H] -> float32 [P, H]: vectors of the sequences that end in this step; None if none do."""
        vectors = [
            self._vector(part, hidden[part.begin : part.end]) for part in arguments.parts if self._adds_up(part, hidden)
        ]
        return torch.stack(vectors) if vectors else None

    def _part(self, batch: ScheduledBatch, index: int, end: int) -> _Part:
        row, num_new = int(batch.rows[index]), int(batch.num_new[index])
        seq = self._rows.sequences[row]
        first = int(batch.num_computed[index])
        length = seq.prompt_len if first + num_new == seq.prompt_len else 0
        params = seq.params
        return _Part(row, end - num_new, end, first == 0, params.pooling == "mean", length, params.normalize)

    def _adds_up(self, part: _Part, hidden: Tensor) -> bool:
        """Add the part to its sequence's sum if a mean is wanted. True for the last part."""
        if part.is_mean:
            if self._sums is None:
                shape = (len(self._rows.sequences), self.hidden_size)
                self._sums = self._device.results({"sums": (shape, torch.float32)}).tensors["sums"]
            if part.is_first:
                self._sums[part.row].zero_()
            self._sums[part.row] += hidden[part.begin : part.end].float().sum(0)
        return part.length > 0

    def _vector(self, part: _Part, hidden: Tensor) -> Tensor:
        vector = self._sums[part.row] / part.length if part.is_mean else hidden[-1].float()
        return vector / torch.linalg.vector_norm(vector).clamp_min(1e-12) if part.normalize else vector
