"""Meaning of a step's tokens: when a sequence ends (SPEC 6.9), and what the client is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np

from fuseline.engine.messages import (
    Output,
    PooledOutput,
    PositionLogprobs,
    StepOutputs,
    StepStats,
    TokenDeltas,
    TokenOutput,
)
from fuseline.engine.params import PoolingParams
from fuseline.engine.run.runner import PreparedBatch
from fuseline.engine.run.sampling import OK, RowScores, Sampled
from fuseline.engine.state.rows import RequestRows
from fuseline.engine.state.sequence import Sequence


@dataclass(frozen=True)
class Ending:
    reason: str
    stop_token_id: int | None = None
    error: str = ""
    is_bad_request: bool = False


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a step has given a sequence, their log-probabilities if wanted, and how it ends, if it does."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    ending: Ending | None = None


@dataclass
class Report:
    """Outputs and counts since the last message."""

    has_news: bool = False
    """The counts have changed without a step."""
    outputs: list[Output] = field(default_factory=list)
    handles: bytes = b""
    token_ids: bytes = b""
    num_step_tokens: int = 0
    num_prompt_tokens: int = 0

    def __bool__(self) -> bool:
        return bool(self.outputs or self.token_ids or self.has_news)

    def add_deltas(self, handles: np.ndarray, tokens: np.ndarray) -> None:
        """One token each [N] int64, from choices that are told of nothing else."""
        self.handles += handles.tobytes()
        self.token_ids += tokens.tobytes()

    def message(self, stats: StepStats) -> StepOutputs:
        return StepOutputs(outputs=self.outputs, deltas=TokenDeltas(self.handles, self.token_ids), stats=stats)


def on_fast_path(batch: PreparedBatch, sampled: Sampled, rows: RequestRows) -> np.ndarray:
    """[N] bool: positions whose token neither ends its sequence nor has to be told with anything else, like all other
    kept ones of the sequence in this step.

    A sequence without may still go on: those are looked at one by one.
    """
    scheduled = batch.scheduled
    places = scheduled.rows[scheduled.sampling]
    stays = rows.generation[places] == scheduled.generation[scheduled.sampling]
    is_stop = (rows.stops[places] == sampled.tokens[:, None]).any(1)
    is_fast = stays & rows.is_fast[places] & (sampled.status == OK) & ~is_stop
    is_fast &= scheduled.lengths + 1 < rows.end[places]
    if batch.kept is not None:
        slow = scheduled.sampling[batch.kept & ~is_fast]
        is_fast &= batch.kept & ~np.isin(scheduled.sampling, slow)
    return is_fast


def store_prompt_scores(scoring: list[tuple[Sequence, range]], scores: RowScores) -> list[Sequence]:
    """Give sequences the log-probabilities of the prompt tokens that a step has scored. Returns those with a NaN."""
    row, faulty = 0, []
    for seq, positions in scoring:
        rows = slice(row, row + len(positions))
        if seq.prompt_scores is not None and len(positions):
            tokens, best = seq.tokens[positions.start : positions.stop], (rows, slice(seq.prompt_scores.num_top))
            seq.prompt_scores.add(
                positions.start, tokens, scores.logprobs[rows], scores.ranks[rows], scores.top_ids[best],
                scores.top_logprobs[best],
            )  # fmt: skip
        if scores.logprobs[rows].isnan().any():
            faulty.append(seq)
        row += len(positions)
    return faulty


def new_tokens(
    seq: Sequence, sampled: Sampled, positions: list[int], lengths: np.ndarray, max_model_len: int
) -> tuple[NewTokens, int]:
    """Tokens that a step has sampled at `positions` of a sequence, as far as they belong to it, and the status of the
    last position: they stop at a token that ends the sequence, and before a position without a token.
    """
    tokens, logprobs = [], []
    for position in positions:
        if sampled.status[position] != OK:
            return NewTokens(tuple(tokens), tuple(logprobs)), int(sampled.status[position])
        tokens.append(int(sampled.tokens[position]))
        if seq.params.logprobs is not None:
            logprobs.append(sampled.position(position, seq.params))
        ending = find_ending(seq, tokens[-1], int(lengths[position]) + 1, max_model_len)
        if ending:
            return NewTokens(tuple(tokens), tuple(logprobs), ending), OK
    return NewTokens(tuple(tokens), tuple(logprobs)), OK


def find_ending(seq: Sequence, token: int, length: int, max_model_len: int) -> Ending | None:
    """Whether `token` ends the sequence, which has `length` tokens with it. Stop strings are the API's; it aborts."""
    params, num_generated = seq.params, length - seq.prompt_len
    if params.grammar and token in params.ending_token_ids:  # allowed only where the grammar is complete
        return Ending("stop", token if token in params.stop_token_ids else None)
    if num_generated >= params.min_tokens:
        if token in params.eos_token_ids:
            return Ending("stop")
        if token in params.stop_token_ids:
            return Ending("stop", token)
    if length >= max_model_len or num_generated >= params.max_tokens:
        return Ending("length")
    return None


def make_outputs(seq: Sequence, new: NewTokens) -> Iterator[Output]:
    """One output for each choice that the sequence stands for."""
    is_first, ending = not seq.has_output, new.ending
    seq.has_output = True
    if isinstance(seq.params, PoolingParams):
        yield pooled_output(seq, ending)
        return
    if is_first and seq.rows is not None:
        seq.rows.note_output(seq)
    output = TokenOutput(
        request_id=seq.request.request_id,
        index=seq.choices[0],
        token_ids=new.token_ids,
        logprobs=new.logprobs,
        handle=seq.handle if is_first or ending else None,
        num_cached_tokens=seq.num_cached if is_first else 0,
        queue_seconds=seq.queue_seconds if is_first else None,
        num_preemptions=seq.num_preemptions if ending else 0,
        times=seq.times if ending else None,
        finish_reason=ending.reason if ending else None,
        stop_token_id=ending.stop_token_id if ending else None,
        error=ending.error if ending else "",
        is_bad_request=ending.is_bad_request if ending else False,
    )
    if seq.prompt_scores is not None and (ending is None or not ending.error):
        yield msgspec.structs.replace(output, prompt_logprobs=seq.prompt_scores.message())
        seq.prompt_scores = None
    else:
        yield output
    for choice in seq.choices[1:]:
        yield msgspec.structs.replace(output, index=choice)


def pooled_output(seq: Sequence, ending: Ending, vector: bytes = b"") -> PooledOutput:
    return PooledOutput(
        request_id=seq.request.request_id,
        vector=vector,
        finish_reason=ending.reason,
        error=ending.error,
        is_bad_request=ending.is_bad_request,
        num_cached_tokens=seq.num_cached,
        queue_seconds=seq.queue_seconds,
    )
