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
    """Positions of one sequence in a step: all that it computes for a mean, else its last one."""

    row: int
    count: int
    is_first: bool
    is_mean: bool
    length: int
    """Tokens of the sequence when this is its last part, else 0."""
    normalize: bool


@dataclass(frozen=True)
class PoolArguments:
    parts: list[_Part]
    rows: np.ndarray
    """[Q] int64: tokens of the step whose hidden states are wanted, one part after the other."""


class Pooler:
    """A mean over a prompt that several steps compute is summed up on the device."""

    def __init__(self, rows: RequestRows, device: Device, hidden_dim: int) -> None:
        self._rows, self._device = rows, device
        self.hidden_dim = hidden_dim
        self._sums: Tensor | None = None  # [R, D] float32, made by the first mean

    def prepare(self, batch: ScheduledBatch) -> PoolArguments | None:
        """Positions of the step that are pooled; None without any."""
        if not self._rows.num_pooled:
            return None
        ends = np.cumsum(batch.num_new)
        parts, rows = [], []
        for index in self._rows.is_pooled[batch.rows].nonzero()[0].tolist():
            part = self._part(batch, index)
            if part.is_mean or part.length:
                parts.append(part)
                rows.append(np.arange(ends[index] - part.count, ends[index]))
        return PoolArguments(parts, np.concatenate(rows)) if parts else None

    def launch(self, hidden: Tensor, arguments: PoolArguments) -> Tensor | None:
        """hidden [Q, D] -> float32 [P, D]: vectors of the sequences that end in this step; None if none do."""
        vectors = []
        for part, states in zip(arguments.parts, hidden.split([part.count for part in arguments.parts]), strict=True):
            if part.is_mean:
                self._add(part, states)
            if part.length:
                vectors.append(self._vector(part, states))
        return torch.stack(vectors) if vectors else None

    def _part(self, batch: ScheduledBatch, index: int) -> _Part:
        row, num_new, first = int(batch.rows[index]), int(batch.num_new[index]), int(batch.num_computed[index])
        seq = self._rows.sequences[row]
        is_mean = seq.params.pooling == "mean"
        length = seq.prompt_len if first + num_new == seq.prompt_len else 0
        return _Part(row, num_new if is_mean else 1, first == 0, is_mean, length, seq.params.normalize)

    def _add(self, part: _Part, states: Tensor) -> None:
        if self._sums is None:
            shape = (len(self._rows.sequences), self.hidden_dim)
            self._sums = self._device.results({"sums": (shape, torch.float32)}).tensors["sums"]
        if part.is_first:
            self._sums[part.row].zero_()
        self._sums[part.row] += states.float().sum(0)

    def _vector(self, part: _Part, states: Tensor) -> Tensor:
        vector = self._sums[part.row] / part.length if part.is_mean else states[-1].float()
        return vector / torch.linalg.vector_norm(vector).clamp_min(1e-12) if part.normalize else vector
