"""Per-row state of the running sequences, in arrays: a step's sampling settings are one gather, not a loop."""

from __future__ import annotations

import numpy as np

from fuseline.engine.request import Sequence

MIN_TEMPERATURE = 0.01
"""A temperature in (0, this) is raised to it (SPEC 6.2)."""

INT64_MAX = 2**63 - 1

class RequestRows:
    """Row r holds the sequence whose `row` is r. Legend: R rows (max_num_seqs), L max_model_len."""

    def __init__(self, num_rows: int, max_model_len: int) -> None:
        self.tokens = np.zeros((num_rows, max_model_len + 1), np.int32)  # [R, L + 1]
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int64)
        self.top_p = np.zeros(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.repetition = np.zeros(num_rows, np.float32)
        self.frequency = np.zeros(num_rows, np.float32)
        self.presence = np.zeros(num_rows, np.float32)
        self.seed = np.zeros(num_rows, np.int64)
        self.num_logprobs = np.zeros(num_rows, np.int64)  # -1: none wanted
        self.prompt_len = np.zeros(num_rows, np.int64)
        self.logprobs_mode = np.zeros(num_rows, np.int64)
        self.has_history = np.zeros(num_rows, bool)
        self.has_lists = np.zeros(num_rows, bool)

    def load(self, seq: Sequence) -> None:
        row, params = seq.row, seq.params
        is_greedy = params.temperature == 0
        self.tokens[row, : seq.num_tokens] = seq.tokens
        self.temperature[row] = 0.0 if is_greedy else max(params.temperature, MIN_TEMPERATURE)
        self.top_k[row] = 0 if is_greedy else min(max(params.top_k, 0), INT64_MAX)
        self.top_p[row] = 1.0 if is_greedy else params.top_p
        self.min_p[row] = 0.0 if is_greedy else params.min_p
        self.repetition[row] = params.repetition_penalty
        self.frequency[row] = params.frequency_penalty
        self.presence[row] = params.presence_penalty
        self.seed[row] = seq.seed
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.prompt_len[row] = seq.prompt_len
        self.logprobs_mode[row] = params.logprobs_mode
        penalties = (params.repetition_penalty != 1, params.frequency_penalty != 0, params.presence_penalty != 0)
        self.has_history[row] = any(penalties)
        self.has_lists[row] = bool(
            params.logit_bias or params.allowed_token_ids or params.bad_words or params.min_tokens > 0
        )


def banned_tokens(seq: Sequence) -> list[int]:
    """Tokens that may not come next: bad words one token short of complete, and what ends a sequence too early."""
    params = seq.params
    banned = [word[-1] for word in params.bad_words if _ends_with(seq, word[:-1])]
    if seq.num_generated < params.min_tokens:
        banned += [*params.eos_token_ids, *params.masked_eos_token_ids, *params.stop_token_ids]
    return banned


def _ends_with(seq: Sequence, beginning: tuple[int, ...]) -> bool:
    """Only generated tokens count as the beginning of a bad word (SPEC 6.3: "the output so far")."""
    count = len(beginning)
    return count == 0 or (seq.num_generated >= count and tuple(seq.tokens[-count:]) == beginning)
