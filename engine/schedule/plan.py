"""What one step computes: a plain value from the scheduler to the runner."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fuseline.engine.request import Sequence


@dataclass
class Plan:
    """`sequences[i]` computes its next `counts[i]` tokens. Tables: [G, rows, M] int32, read by `Sequence.row`."""

    sequences: list[Sequence]
    counts: list[int]
    started: list[Sequence]
    """Those that got their row in this step: their per-row state must be loaded first."""
    tables: np.ndarray

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


@dataclass
class StepBudget:
    """What is still free while a step is put together."""

    tokens_left: int
    spare_rows: int
    """Logits rows beyond one for each running sequence."""
    counts: dict[Sequence, int] = field(default_factory=dict)
    started: list[Sequence] = field(default_factory=list)
    has_preempted: bool = False

    def add(self, seq: Sequence, count: int) -> None:
        self.counts[seq] = count
        self.tokens_left -= count
        self.spare_rows -= num_extra_rows(seq, count)

    def drop(self, seq: Sequence) -> None:
        """Take a preempted sequence out again; its own row of logits becomes spare."""
        count = self.counts.pop(seq, 0)
        self.tokens_left += count
        self.spare_rows += num_extra_rows(seq, count) + 1
        if seq in self.started:
            self.started.remove(seq)


def num_extra_rows(seq: Sequence, count: int) -> int:
    return max(0, count - 1) if seq.prompt_scores is not None else 0
