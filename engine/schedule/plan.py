"""What one step computes: a plain value from the scheduler to the runner."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fuseline.compile.graph_inputs import BlockCopy
from fuseline.engine.memory.swap import SwapSpace
from fuseline.engine.request import Sequence
from fuseline.engine.run.request_rows import RequestRows


@dataclass(frozen=True)
class Plan:
    """The sequence of `rows[i]` computes its next `counts[i]` tokens. Legend: S sequences, N of them sample.

    The arrays are as they were when the plan was made; while it runs, a row may go to another sequence, with another
    tenancy.
    """

    rows: np.ndarray  # [S] int64
    tenancy: np.ndarray  # [S] int64, of the rows
    counts: np.ndarray  # [S] int64
    num_computed: np.ndarray  # [S] int64, before the step
    sampling: np.ndarray  # [N] int64, indices into the sequences
    lengths: np.ndarray  # [N] int64, tokens of the sampling sequences; the next one goes there
    complete: np.ndarray  # int64, indices of the sequences that want no tokens and have their last one computed
    started: list[Sequence]
    """Those that got their row in this step."""
    num_tokens: int
    copies: tuple[BlockCopy, ...] = ()
    """Blocks to swap, in this order, before the step computes."""


@dataclass
class StepBudget:
    """What is still free while a step is put together."""

    tokens_left: int
    spare_rows: int
    """Logits rows beyond one for each running sequence."""
    counts: np.ndarray  # [R] int64, tokens to compute by row
    started: list[Sequence] = field(default_factory=list)
    has_preempted: bool = False

    def add(self, seq: Sequence, count: int) -> None:
        self.counts[seq.row] = count
        self.tokens_left -= count
        self.spare_rows -= num_extra_rows(seq, count)

    def add_rows(self, rows: np.ndarray) -> None:
        """One token each."""
        self.counts[rows] = 1
        self.tokens_left -= len(rows)

    def drop(self, seq: Sequence) -> None:
        """Take a preempted sequence out again; its own row of logits becomes spare."""
        count = int(self.counts[seq.row])
        self.counts[seq.row] = 0
        self.tokens_left += count
        self.spare_rows += num_extra_rows(seq, count) + 1
        if seq in self.started:
            self.started.remove(seq)


def num_extra_rows(seq: Sequence, count: int) -> int:
    return max(0, count - 1) if seq.prompt_scores is not None else 0


def make_plan(budget: StepBudget, state: RequestRows, swap: SwapSpace | None = None) -> Plan:
    rows = np.flatnonzero(budget.counts)
    counts, num_computed, num_tokens = budget.counts[rows], state.num_computed[rows], state.num_tokens[rows]
    is_last, wants_tokens = num_computed + counts == num_tokens, state.wants_tokens[rows]
    sampling = np.flatnonzero(is_last & wants_tokens)
    return Plan(
        rows=rows,
        tenancy=state.tenancy[rows],
        counts=counts,
        num_computed=num_computed,
        sampling=sampling,
        lengths=num_tokens[sampling],
        complete=np.flatnonzero(is_last & ~wants_tokens),
        started=budget.started,
        num_tokens=int(counts.sum()),
        # An empty plan is not computed: its copies wait for the next one.
        copies=swap.take_copies() if swap and len(rows) else (),
    )
