"""The work of one step: a value from the scheduler to the runner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fuseline.compile.graph_inputs import BlockCopy
from fuseline.engine.state.sequence import Sequence


@dataclass(frozen=True)
class ScheduledBatch:
    """The sequence of `rows[i]` computes its next `num_new[i]` tokens. Legend: S sequences, N positions that sample.

    A sequence without drafts samples at one position at most. One with k drafts computes them behind its known tokens
    and samples at k + 1 positions: after its last known token, and after each draft. Tokens are kept as long as they
    equal the drafts.

    The arrays are as they were when the batch was scheduled; while it runs, a row may go to another sequence, with
    another generation.
    """

    rows: np.ndarray  # [S] int64
    generation: np.ndarray  # [S] int64, of the rows
    num_new: np.ndarray  # [S] int64
    num_computed: np.ndarray  # [S] int64, before the step
    sampling: np.ndarray  # [N] int64, ascending indices into the sequences, k + 1 times for one with k drafts
    lengths: np.ndarray  # [N] int64, tokens before the position that samples; the new token goes there
    complete: np.ndarray  # int64, indices of the sequences that want no tokens and have their last one computed
    started: list[Sequence]
    """Those that got their row in this step."""
    num_tokens: int
    num_drafts: np.ndarray | None = None  # [S] int64; None: no sequence brings any
    copies: tuple[BlockCopy, ...] = ()
    """Blocks to swap, in this order, before the step computes."""
    forks: tuple[np.ndarray, ...] = ()
    """[2, F] int64 for each cache group, or none: blocks, and those that become copies of them before all that."""
    state_copies: np.ndarray | None = None
    """[2, F] int64: slots of recurrent states to read, all before any is written, and those to write; None: none."""
