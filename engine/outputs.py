"""What a step's tokens mean: when a sequence ends (SPEC 6.9) and what the client is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np

from fuseline.engine.messages import PlainTokens, PositionLogprobs, StepOutputs, StepStats, TokenOutput
from fuseline.engine.request import Sequence
from fuseline.engine.run.request_rows import RequestRows
from fuseline.engine.run.sampling import OK, Sampled
from fuseline.engine.schedule.plan import Plan


@dataclass(frozen=True)
class Ending:
    reason: str
    stop_token_id: int | None = None
    error: str = ""
    is_bad_request: bool = False


@dataclass
class Report:
    """What there is to tell since the last message."""

    has_news: bool = False
    """The counts have changed without a step."""

    outputs: list[TokenOutput] = field(default_factory=list)
    handles: bytes = b""
    token_ids: bytes = b""
    num_step_tokens: int = 0
    num_prompt_tokens: int = 0

    def __bool__(self) -> bool:
        return bool(self.outputs or self.token_ids or self.has_news)

    def add_plain(self, handles: np.ndarray, tokens: np.ndarray) -> None:
        """One token each [N] int64, from choices that are told of nothing else."""
        self.handles += handles.tobytes()
        self.token_ids += tokens.tobytes()

    def message(self, stats: StepStats) -> StepOutputs:
        return StepOutputs(outputs=self.outputs, plain=PlainTokens(self.handles, self.token_ids), stats=stats)


def goes_on_plainly(plan: Plan, sampled: Sampled, rows: RequestRows) -> np.ndarray:
    """[N] bool: sampling sequences whose new token neither ends them nor has to be told with anything else.

    A false one may still go on: the others are looked at one by one.
    """
    places = plan.rows[plan.sampling]
    stays = rows.tenancy[places] == plan.tenancy[plan.sampling]
    is_stop = (rows.stops[places] == sampled.tokens[:, None]).any(1)
    return stays & rows.is_plain[places] & (sampled.status == OK) & ~is_stop & (plan.lengths + 1 < rows.end[places])


def find_ending(seq: Sequence, max_model_len: int) -> Ending | None:
    """Whether the newest token ends the sequence. Stop strings are the API's; it aborts."""
    params, token = seq.params, seq.tokens[-1]
    if seq.num_generated >= params.min_tokens:
        if token in params.eos_token_ids:
            return Ending("stop")
        if token in params.stop_token_ids:
            return Ending("stop", token)
    if len(seq.tokens) >= max_model_len or seq.num_generated >= params.max_tokens:
        return Ending("length")
    return None


def make_outputs(
    seq: Sequence, tokens: tuple[int, ...], logprobs: tuple[PositionLogprobs, ...], ending: Ending | None
) -> Iterator[TokenOutput]:
    """One output for each choice that the sequence stands for."""
    is_first = not seq.has_output
    seq.has_output = True
    if is_first and seq.rows is not None:
        seq.rows.note_output(seq)
    output = TokenOutput(
        request_id=seq.request.request_id,
        index=seq.choices[0],
        token_ids=tokens,
        logprobs=logprobs,
        handle=seq.handle if is_first or ending else None,
        num_cached_tokens=seq.num_cached if is_first else 0,
        queue_seconds=seq.queue_seconds if is_first else None,
        finish_reason=ending.reason if ending else None,
        stop_token_id=ending.stop_token_id if ending else None,
        error=ending.error if ending else "",
        is_bad_request=ending.is_bad_request if ending else False,
    )
    if seq.prompt_scores is not None and (ending is None or not ending.error):
        yield msgspec.structs.replace(output, prompt_logprobs=tuple(seq.prompt_scores))
        seq.prompt_scores = None
    else:
        yield output
    for choice in seq.choices[1:]:
        yield msgspec.structs.replace(output, index=choice)
