"""Drafts: who proposes them, which sequences get some, and which of them are kept once the model has spoken."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np

from fuseline.engine.state.rows import RequestRows
from fuseline.engine.state.scheduled_batch import ScheduledBatch


class Drafter(Protocol):
    """Guesses how sequences go on. A wrong guess costs time, never a different token."""

    num_tokens: int
    """Most drafts of a proposal."""

    def propose(self, tokens: np.ndarray) -> Seq[int]:
        """Drafts of the tokens that follow the known ones [T] int32 of a sequence; none if nothing comes to mind."""


class Drafting:
    """Asks the drafter before a step is scheduled, and counts what has become of its drafts."""

    def __init__(self, drafter: Drafter, rows: RequestRows, vocab_size: int, rope_threshold: int | None) -> None:
        self._drafter, self._rows, self._vocab_size = drafter, rows, vocab_size
        self._rope_threshold = rope_threshold
        self.num_drafts = 0
        self.num_accepted = 0
        self.num_emitted = 0

    def propose(self) -> None:
        """Put drafts behind the known tokens of all sequences that have nothing else to compute but their last one."""
        rows = self._rows
        rows.num_drafts[:] = 0
        for row in np.flatnonzero((rows.num_remaining() == 1) & rows.wants_tokens).tolist():
            known = int(rows.num_known[row])
            if known < rows.prompt_len[row] or (limit := self._limit(row, known)) <= 0:
                continue
            drafts = [int(token) for token in self._drafter.propose(rows.tokens[row, :known])[:limit]]
            bad = (k for k, token in enumerate(drafts) if not 0 <= token < self._vocab_size)
            rows.set_drafts(row, drafts[: next(bad, len(drafts))])

    def note(self, num_drafts: np.ndarray, num_accepted: int) -> None:
        """Count a step: num_drafts [R] of its sequences, and the drafts that were kept."""
        self.num_drafts += int(num_drafts.sum())
        self.num_accepted += num_accepted
        self.num_emitted += num_accepted + int(np.count_nonzero(num_drafts))

    def _limit(self, row: int, known: int) -> int:
        """Drafts that a row may bring: at most a token more is kept, up to its end, and all use one rope table."""
        limit = min(self._drafter.num_tokens, int(self._rows.end[row]) - 1 - known)
        if self._rope_threshold is not None and self._rows.variant[row] == 0:
            limit = min(limit, self._rope_threshold - known)
        return limit


def drafts_of(batch: ScheduledBatch, rows: RequestRows) -> np.ndarray:
    """[N] int64: the draft at each position that samples; -1 at the last of each sequence. The batch has drafts."""
    places = batch.rows[batch.sampling]
    is_last = np.append(batch.sampling[1:] != batch.sampling[:-1], True) if len(places) else np.zeros(0, bool)
    return np.where(is_last, -1, rows.tokens[places, np.minimum(batch.lengths, rows.max_model_len)])


def kept_positions(batch: ScheduledBatch, drafts: np.ndarray, tokens: np.ndarray, is_ok: np.ndarray) -> np.ndarray:
    """[N] bool: positions whose sampled token belongs to the sequence: those before which all drafts were right.

    drafts as `drafts_of` gives them; tokens, is_ok [N] of the sampler.
    """
    is_missed = (tokens != drafts) | ~is_ok
    num_missed = np.cumsum(is_missed) - is_missed  # before each position, in all sequences
    first = np.searchsorted(batch.sampling, batch.sampling)
    return num_missed == num_missed[first]
