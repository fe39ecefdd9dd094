"""Tokens and logits rows that are still free while a step is put together, and the batch that comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fuseline.engine.memory.swap import SwapSpace
from fuseline.engine.state.rows import RequestRows
from fuseline.engine.state.scheduled_batch import ScheduledBatch
from fuseline.engine.state.sequence import Sequence


@dataclass
class StepBudget:
    """Free tokens and logits rows of a step, and the sequences that take part so far."""

    tokens_left: int
    spare_rows: int
    """Logits rows beyond one for each running sequence."""
    counts: np.ndarray  # [R] int64, tokens to compute by row, drafts included
    num_drafts: np.ndarray  # [R] int64
    started: list[Sequence] = field(default_factory=list)
    scored_cost: int = 1
    """Tokens that one counts as if its row of logits is scored."""
    num_turns: int = 0
    """Of those that start, prompts of a body behind its first one."""
    has_preempted: bool = False

    def add(self, seq: Sequence, count: int, num_drafts: int = 0) -> None:
        """Compute `count` tokens of the sequence, of which the last `num_drafts` are drafts."""
        self.counts[seq.row] = count
        self.num_drafts[seq.row] = num_drafts
        self.tokens_left -= count * self.cost(seq)
        self.spare_rows -= self._num_extra_rows(seq)

    def start(self, seq: Sequence, count: int) -> None:
        """As `add`, for a sequence that has got a row."""
        self.spare_rows -= 1
        self.add(seq, count)
        self.started.append(seq)
        self.num_turns += seq.request.turn > 0

    def add_rows(self, rows: np.ndarray) -> None:
        """Compute one token of each row."""
        self.counts[rows] = 1
        self.tokens_left -= len(rows)

    def shorten(self, seq: Sequence, count: int) -> None:
        """Compute no more than `count` tokens of a running sequence, if it takes part so far."""
        excess = int(self.counts[seq.row]) - count
        if excess > 0:
            self.spare_rows += self._num_extra_rows(seq)
            self.counts[seq.row] = count
            self.tokens_left += excess * self.cost(seq)
            self.spare_rows -= self._num_extra_rows(seq)

    def drop(self, seq: Sequence) -> None:
        """Take a preempted sequence out again; its own row of logits becomes spare."""
        self.tokens_left += int(self.counts[seq.row]) * self.cost(seq)
        self.spare_rows += self._num_extra_rows(seq) + 1
        self.counts[seq.row] = self.num_drafts[seq.row] = 0
        if seq in self.started:
            self.started.remove(seq)
            self.num_turns -= seq.request.turn > 0

    def cost(self, seq: Sequence) -> int:
        """Tokens that each token of the sequence counts as."""
        return 1 if seq.prompt_scores is None else self.scored_cost

    def _num_extra_rows(self, seq: Sequence) -> int:
        """Logits rows of a sequence beyond its own one."""
        if seq.wants_every_row:
            return max(0, int(self.counts[seq.row]) - 1)
        return int(self.num_drafts[seq.row])


def make_batch(budget: StepBudget, state: RequestRows, swap: SwapSpace | None = None) -> ScheduledBatch:
    rows = budget.counts.nonzero()[0]
    num_new, num_computed, num_tokens = budget.counts[rows], state.num_computed[rows], state.num_tokens[rows]
    num_drafts = budget.num_drafts[rows] if state.with_drafts and budget.num_drafts.any() else None
    num_settled = num_computed + num_new if num_drafts is None else num_computed + num_new - num_drafts
    is_last, wants_tokens = num_settled == num_tokens, state.wants_tokens[rows]
    sampling = (is_last & wants_tokens).nonzero()[0]
    lengths = num_tokens[sampling]
    if num_drafts is not None:
        sampling, lengths = _with_drafts(sampling, lengths, num_drafts)
    return ScheduledBatch(
        rows=rows,
        generation=state.generation[rows],
        num_new=num_new,
        num_computed=num_computed,
        sampling=sampling,
        lengths=lengths,
        complete=(is_last & ~wants_tokens).nonzero()[0],
        started=budget.started,
        num_tokens=int(num_new.sum()),
        num_drafts=num_drafts,
        # An empty batch is not computed: its copies wait for the next one.
        copies=swap.take_copies() if swap and len(rows) else (),
    )


def _with_drafts(sampling: np.ndarray, lengths: np.ndarray, num_drafts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One position more for each draft of a sequence, behind it."""
    repeats = 1 + num_drafts[sampling]
    firsts = np.repeat(np.cumsum(repeats) - repeats, repeats)
    return np.repeat(sampling, repeats), np.repeat(lengths, repeats) + np.arange(repeats.sum()) - firsts
