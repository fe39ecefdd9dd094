"""Bit masks of a step's rows, and tokens that grammars force (jump-ahead)."""

from __future__ import annotations

import numpy as np
import torch

from fuseline.engine.run.grammar.matcher import MOST_FORCED
from fuseline.engine.state.rows import RequestRows
from fuseline.engine.state.scheduled_batch import ScheduledBatch
from fuseline.engine.state.sequence import TokenGrammar


def bitmask_of(batch: ScheduledBatch, rows: RequestRows, vocab_size: int) -> torch.Tensor:
    """[N, ceil(V / 32)] int32: the tokens that each sampling position may take; all for rows without a grammar.

    All tokens before the first position of a row with a grammar are known.
    """
    places = batch.rows[batch.sampling]
    masks = np.full((len(places), -(-vocab_size // 32)), -1, np.int32)
    first = np.searchsorted(batch.sampling, batch.sampling)
    for begin in np.flatnonzero((first == np.arange(len(places))) & rows.has_grammar[places]).tolist():
        row, length, end = int(places[begin]), int(batch.lengths[begin]), begin
        while end < len(places) and first[end] == begin:
            end += 1
        state = _catch_up(rows, row, length)
        drafts = rows.tokens[row, length : length + end - begin - 1].tolist()
        masks[begin:end] = state.masks(drafts)
    return torch.from_numpy(masks)


class ForcedTokens:
    """Puts the tokens that grammars force behind the known ones of their sequences, as drafts that are always kept: a
    step then computes all of them.
    """

    num_tokens = MOST_FORCED

    def __init__(self, rows: RequestRows, rope_threshold: int | None) -> None:
        self._rows = rows
        self._rope_threshold = rope_threshold

    def propose(self) -> None:
        """For sequences that have nothing else to compute but their last token, and no other drafts."""
        rows = self._rows
        if not rows.has_grammar.any():
            return
        ready = rows.has_grammar & (rows.num_remaining() == 1) & (rows.num_known >= rows.prompt_len)
        for row in np.flatnonzero(ready).tolist():
            known = int(rows.num_known[row])
            limit = min(MOST_FORCED, int(rows.end[row]) - 1 - known)
            if self._rope_threshold is not None and rows.variant[row] == 0:
                limit = min(limit, self._rope_threshold - known)
            if limit > 0 and known > rows.prompt_len[row]:
                rows.set_drafts(row, _catch_up(rows, row, known).forced(limit))
            else:
                rows.num_drafts[row] = 0


def _catch_up(rows: RequestRows, row: int, length: int) -> TokenGrammar:
    state = rows.sequences[row].grammar
    begin = int(rows.prompt_len[row]) + state.num_seen
    if begin < length:
        state.advance(rows.tokens[row, begin:length].tolist())
    return state
