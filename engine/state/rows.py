"""Per-row state of the running sequences, in arrays: what a step does for all of them is a few array operations."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from fuseline.engine.params import PoolingParams, SamplingParams
from fuseline.engine.state.sequence import Sequence

MIN_TEMPERATURE = 0.01
"""A temperature in (0, this) is raised to it (SPEC 6.2)."""

INT64_MAX = 2**63 - 1

NUM_STOPS = 8
"""Ending tokens that the arrays hold for a row; a row with more is looked at one by one."""


class RequestRows:
    """Row r holds the sequence whose `row` is r. Legend: R rows (max_num_seqs), L max_model_len.

    `with_drafts`: steps bring drafts. The next step of a row that samples is then scheduled when the tokens of the last
    one are known, since how many there are depends on which drafts are kept.
    """

    def __init__(self, num_rows: int, max_model_len: int, with_drafts: bool = False) -> None:
        self.max_model_len = max_model_len
        self.with_drafts = with_drafts
        self.sequences: list[Sequence | None] = [None] * num_rows
        self.evicted: dict[tuple[int, int], Sequence] = {}
        """By row and generation: sequences that lost their row while a step computes a token for them."""
        self.handle = np.zeros(num_rows, np.int64)
        self.generation = np.zeros(num_rows, np.int64)  # counts the sequences that have had the row
        self.tokens = np.zeros((num_rows, max_model_len + 1), np.int32)  # [R, L + 1], drafts behind the known ones
        self.prompt_len = np.zeros(num_rows, np.int64)
        self.num_tokens = np.zeros(num_rows, np.int64)  # with the one that a started step is about to yield
        self.num_known = np.zeros(num_rows, np.int64)  # without it
        self.num_drafts = np.zeros(num_rows, np.int64)  # drafts that the next step may bring
        self.num_computed = np.zeros(num_rows, np.int64)  # what started steps compute, drafts included
        self.num_wanted = np.zeros(num_rows, np.int64)  # tokens to compute at most; the last one never needs it
        self.end = np.zeros(num_rows, np.int64)  # length at which the sequence ends
        self.stops = np.full((num_rows, NUM_STOPS), -1, np.int64)  # [R, NUM_STOPS], -1: none
        self.is_fast = np.zeros(num_rows, bool)  # its outputs are a token each and nothing else
        self.is_parent = np.zeros(num_rows, bool)  # other choices wait for its prompt
        self.wants_tokens = np.zeros(num_rows, bool)
        self.wants_scores = np.zeros(num_rows, bool)
        self.is_pooled = np.zeros(num_rows, bool)
        self.has_embeds = np.zeros(num_rows, bool)
        self.num_pooled = 0  # rows that are pooled
        self.num_embedded = 0  # rows with embeddings
        self.state_slot = np.zeros(num_rows, np.int64)  # of its recurrent state
        self.variant = np.zeros(num_rows, np.int64)  # rope table
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int64)
        self.top_p = np.zeros(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.repetition = np.zeros(num_rows, np.float32)
        self.frequency = np.zeros(num_rows, np.float32)
        self.presence = np.zeros(num_rows, np.float32)
        self.seed = np.zeros(num_rows, np.int64)
        self.num_logprobs = np.zeros(num_rows, np.int64)  # -1: none wanted
        self.has_history = np.zeros(num_rows, bool)
        self.reads_tokens = np.zeros(num_rows, bool)  # what it may sample depends on the newest tokens, on the host
        self.has_lists = np.zeros(num_rows, bool)
        self.has_edits = np.zeros(num_rows, bool)  # run/row_edits.py has work for it
        self.has_grammar = np.zeros(num_rows, bool)
        self.may_force = np.zeros(num_rows, bool)  # its grammar leaves often one token only
        self.is_beam = np.zeros(num_rows, bool)  # the next token is known when all beams of the request have theirs
        self.num_beams = 0  # rows that are beams
        self.is_held = np.zeros(num_rows, bool)  # out of steps until its mask is made

    def load(self, seq: Sequence, num_computed: int = 0) -> None:
        """Give the row `seq.row` to a sequence of whose tokens the first `num_computed` need no computing."""
        row = seq.row
        self.sequences[row] = seq
        self.generation[row] += 1
        self.handle[row] = seq.handle
        self.tokens[row, : len(seq.stored)] = seq.stored
        self.prompt_len[row] = seq.prompt_len
        self.num_tokens[row] = self.num_known[row] = len(seq.stored)
        self.num_drafts[row] = 0
        self.num_computed[row] = num_computed
        self.variant[row] = seq.variant
        self.state_slot[row] = seq.state_slot
        self.has_embeds[row] = seq.embeds is not None
        self.is_parent[row] = bool(seq.children)
        self.is_pooled[row] = seq.is_pooled
        self.num_pooled += seq.is_pooled
        self.num_embedded += seq.embeds is not None
        seq.rows = self
        if isinstance(seq.params, PoolingParams):
            self._load_pooling(seq)
        else:
            self._load_endings(seq, seq.params)
            self._load_sampling(seq, seq.params)

    def leave(self, seq: Sequence) -> None:
        row = seq.row
        self.copy_new_tokens(seq)
        seq.num_pending = int(self.num_tokens[row] - self.num_known[row])
        if seq.num_pending:
            self.evicted[row, int(self.generation[row])] = seq
        self.sequences[row] = None
        self.has_grammar[row] = self.may_force[row] = self.reads_tokens[row] = self.is_held[row] = False
        self.generation[row] += 1
        self.num_pooled -= seq.is_pooled
        self.num_embedded -= seq.embeds is not None
        self.num_beams -= int(self.is_beam[row])
        self.is_beam[row] = False
        self.num_tokens[row] = self.num_computed[row] = self.num_wanted[row] = self.num_drafts[row] = 0
        seq.row, seq.rows = -1, None

    def append(self, rows: np.ndarray, tokens: np.ndarray, positions: np.ndarray) -> None:
        """New tokens of the rows at their positions; of a row with several, in ascending order."""
        self.tokens[rows, positions] = tokens
        self.num_known[rows] = positions + 1

    def settle(self, rows: np.ndarray) -> None:
        """The drafts of the rows have been verified: what was computed behind the kept ones does not count."""
        self.num_tokens[rows] = self.num_known[rows]
        self.num_computed[rows] = self.num_known[rows] - 1

    def set_drafts(self, row: int, drafts: Seq[int]) -> None:
        """Guesses of the tokens behind the known ones, for the next step."""
        known = self.num_known[row]
        self.tokens[row, known : known + len(drafts)] = drafts
        self.num_drafts[row] = len(drafts)

    def copy_new_tokens(self, seq: Sequence) -> None:
        row, begin, end = seq.row, len(seq.stored), self.num_known[seq.row]
        seq.stored.frombytes(self.tokens[row, begin:end].tobytes())

    def num_remaining(self, rows: np.ndarray | slice | int = slice(None)) -> np.ndarray:
        """Tokens that can be computed now, drafts apart; 0 for free rows."""
        remaining = np.minimum(self.num_tokens[rows], self.num_wanted[rows]) - self.num_computed[rows]
        remaining = np.where(self.is_held[rows], 0, remaining)
        if self.with_drafts:
            return np.where(self.num_known[rows] < self.num_tokens[rows], 0, remaining)
        if self.num_beams:
            return np.where(self.is_beam[rows] & (self.num_known[rows] < self.num_tokens[rows]), 0, remaining)
        return remaining

    def note_output(self, seq: Sequence) -> None:
        """The first output is out: those that follow may take the fast path."""
        params = seq.params
        num_stops = len(params.ending_token_ids)
        self.is_fast[seq.row] = params.logprobs is None and seq.choices == [seq.index] and num_stops <= NUM_STOPS
        self.wants_scores[seq.row] = False

    def _load_pooling(self, seq: Sequence) -> None:
        row = seq.row
        self.end[row] = self.num_wanted[row] = seq.prompt_len
        self.wants_tokens[row] = self.wants_scores[row] = self.is_fast[row] = False
        self.has_grammar[row] = self.may_force[row] = False

    def _load_endings(self, seq: Sequence, params: SamplingParams) -> None:
        row = seq.row
        self.end[row] = min(seq.prompt_len + params.max_tokens, self.max_model_len)
        self.num_wanted[row] = max(seq.prompt_len, self.end[row] - 1)
        stops = params.ending_token_ids[:NUM_STOPS]
        self.stops[row] = -1
        self.stops[row, : len(stops)] = stops
        self.is_fast[row] = False
        self.wants_tokens[row] = params.max_tokens > 0
        self.wants_scores[row] = seq.prompt_scores is not None
        if seq.has_output:
            self.note_output(seq)

    def _load_sampling(self, seq: Sequence, params: SamplingParams) -> None:
        row = seq.row
        is_greedy = params.temperature == 0
        self.temperature[row] = 0.0 if is_greedy else max(params.temperature, MIN_TEMPERATURE)
        self.top_k[row] = 0 if is_greedy else min(max(params.top_k, 0), INT64_MAX)
        self.top_p[row] = 1.0 if is_greedy else params.top_p
        self.min_p[row] = 0.0 if is_greedy else params.min_p
        self.repetition[row] = params.repetition_penalty
        self.frequency[row] = params.frequency_penalty
        self.presence[row] = params.presence_penalty
        self.seed[row] = seq.seed
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        penalties = (params.repetition_penalty != 1, params.frequency_penalty != 0, params.presence_penalty != 0)
        self.has_history[row] = any(penalties)
        self.has_grammar[row] = params.has_masks
        self.may_force[row] = params.grammar is not None and not params.grammar.is_free
        self.is_beam[row] = params.beams is not None
        self.num_beams += params.beams is not None
        reads = bool(seq.processors) or params.has_masks
        self.reads_tokens[row] = reads or any(len(word) > 1 for word in params.bad_words)
        self.has_edits[row] = bool(seq.processors or params.logprob_token_ids or params.scores_temperature != 1)
        self.has_lists[row] = bool(
            params.logit_bias or params.allowed_token_ids or params.bad_words or params.min_tokens > 0
        )
