"""Bit masks of a step's rows, and tokens that grammars force (jump-ahead)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from fuseline.engine.run.grammar.matcher import MOST_FORCED, STALL_SECONDS
from fuseline.engine.state.rows import RequestRows
from fuseline.engine.state.scheduled_batch import ScheduledBatch
from fuseline.engine.state.sequence import TokenGrammar

if TYPE_CHECKING:
    import xgrammar as xg

MIN_GAIN = 0.25
"""Drafts for each sequence of a step from which on they pay: a CPU step with drafts takes about a fifth longer."""


class GrammarMasks:
    """Masks of the rows with a grammar, W = ceil(V / 32) int32 words with a bit for each token. All rows that a step
    needs are filled in one call.
    """

    def __init__(self, rows: RequestRows, vocab_size: int) -> None:
        self._rows = rows
        num_rows = len(rows.sequences)
        self._masks = np.zeros((num_rows, -(-vocab_size // 32)), np.int32)
        self._length = np.zeros(num_rows, np.int64)  # tokens before what the mask allows
        self._generation = np.zeros(num_rows, np.int64)  # of the row, when it was filled; a row in use has 1 or more
        self._filler: xg.BatchGrammarMatcher | None = None
        self._looks_for_slow = False

    def next(self, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """[R, W]: the tokens that may follow the first `lengths` [R] of the rows [R], which are known."""
        is_stale = self._length[rows] != lengths
        is_stale |= self._generation[rows] != self._rows.generation[rows]
        if is_stale.any():
            self._fill(rows[is_stale], lengths[is_stale])
        return self._masks[rows]

    def of_batch(self, batch: ScheduledBatch) -> torch.Tensor:
        """[N, W]: the tokens that each sampling position may take; all for rows without a grammar.

        All tokens before the first position of a row with a grammar are known.
        """
        places = batch.rows[batch.sampling]
        has_grammar = self._rows.has_grammar[places]
        masks = np.full((len(places), self._masks.shape[1]), -1, np.int32)
        if batch.num_drafts is not None:
            is_drafted = has_grammar & (batch.num_drafts[batch.sampling] > 0)
            self._fill_drafted(masks, batch, is_drafted)
            has_grammar &= ~is_drafted
        masks[has_grammar] = self.next(places[has_grammar], batch.lengths[has_grammar])
        return torch.from_numpy(masks)

    def state(self, row: int, length: int) -> TokenGrammar:
        """Where a row is behind its first `length` tokens."""
        rows = self._rows
        state = rows.sequences[row].grammar
        begin = int(rows.prompt_len[row]) + state.num_seen
        if begin < length:
            state.advance(rows.tokens[row, begin:length].tolist())
        return state

    def _fill(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        states = {row: self.state(row, length) for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)}
        plain = [] if self._looks_for_slow else [row for row, state in states.items() if state.is_plain]
        begin = time.perf_counter()
        self._masks[plain] = -1
        if plain:
            self._fill_plain([states[row].matcher for row in plain], plain)
        for row in states.keys() - plain:
            started = time.perf_counter()
            self._masks[row] = states[row].mask()
            if time.perf_counter() - started > STALL_SECONDS:
                states[row].note_slow()
        # Those of the next step are made one by one, so that a slow one is found.
        self._looks_for_slow = bool(plain) and time.perf_counter() - begin > STALL_SECONDS
        self._length[rows], self._generation[rows] = lengths, self._rows.generation[rows]

    def _fill_plain(self, matchers: list[xg.GrammarMatcher], rows: list[int]) -> None:
        if self._filler is None:
            import xgrammar as xg

            self._filler = xg.BatchGrammarMatcher(max_threads=1)
        self._filler.batch_fill_next_token_bitmask(matchers, torch.from_numpy(self._masks), rows)

    def _fill_drafted(self, masks: np.ndarray, batch: ScheduledBatch, is_drafted: np.ndarray) -> None:
        """Those of the positions [N] of rows with drafts."""
        begins = np.searchsorted(batch.sampling, np.unique(batch.sampling[is_drafted]))
        for begin in begins.tolist():
            index, length = int(batch.sampling[begin]), int(batch.lengths[begin])
            row, count = int(batch.rows[index]), int(batch.num_drafts[index])
            drafts = self._rows.tokens[row, length : length + count].tolist()
            masks[begin : begin + count + 1] = self.state(row, length).masks(drafts)


class ForcedTokens:
    """Puts the tokens that grammars force behind the known ones of their sequences, as drafts that are always kept: a
    step then computes all of them.
    """

    num_tokens = MOST_FORCED

    def __init__(self, masks: GrammarMasks, rows: RequestRows, rope_threshold: int | None) -> None:
        self._masks, self._rows = masks, rows
        self._rope_threshold = rope_threshold

    def is_due(self) -> bool:
        """Whether a step that is scheduled ahead of the tokens before it had better wait for them: some of these are
        drafts, or enough sequences have a grammar that may force tokens.
        """
        rows = self._rows
        if rows.num_drafts.any():
            return True
        num_forced = np.count_nonzero(rows.may_force)
        return num_forced > 0 and num_forced >= MIN_GAIN * np.count_nonzero(rows.num_tokens)

    def is_possible(self) -> bool:
        """Whether the next step may bring drafts: there are grammars, and all tokens before it are known."""
        rows = self._rows
        return bool(rows.has_grammar.any() and (rows.num_known >= rows.num_tokens).all())

    def propose(self) -> None:
        """For sequences that have nothing else to compute but their last token, if the step gains by it."""
        rows = self._rows
        if not rows.with_drafts:
            rows.num_drafts[:] = 0
        if not (rows.with_drafts and rows.has_grammar.any()):
            return
        num_remaining = rows.num_remaining()
        is_ready = rows.has_grammar & (num_remaining == 1) & (rows.num_known > rows.prompt_len)
        ready = np.array([row for row in np.flatnonzero(is_ready) if not rows.sequences[row].grammar.is_slow], np.int64)
        rows.num_drafts[ready] = 0
        is_narrow = np.count_nonzero(self._masks.next(ready, rows.num_known[ready]), axis=1) == 1
        found = {row: self._forced(row) for row in ready[is_narrow].tolist()}
        if sum(map(len, found.values())) < MIN_GAIN * np.count_nonzero(num_remaining):
            return
        for row, tokens in found.items():
            rows.set_drafts(row, tokens)

    def _forced(self, row: int) -> list[int]:
        rows, known = self._rows, int(self._rows.num_known[row])
        limit = min(MOST_FORCED, int(rows.end[row]) - 1 - known)
        if self._rope_threshold is not None and rows.variant[row] == 0:
            limit = min(limit, self._rope_threshold - known)
        return self._masks.state(row, known).forced(limit)
