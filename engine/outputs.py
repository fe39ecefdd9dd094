"""What a step's tokens mean: when a sequence ends (SPEC 6.9) and what the client is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from fuseline.engine.messages import PositionLogprobs, TokenOutput
from fuseline.engine.request import Sequence


@dataclass(frozen=True)
class Ending:
    reason: str
    stop_token_id: int | None = None
    error: str = ""


def find_ending(seq: Sequence, max_model_len: int) -> Ending | None:
    """Whether the newest token ends the sequence. Stop strings are the API's; it aborts."""
    params, token = seq.params, seq.tokens[-1]
    if seq.num_generated >= params.min_tokens:
        if token in params.eos_token_ids:
            return Ending("stop")
        if token in params.stop_token_ids:
            return Ending("stop", token)
    if seq.num_tokens >= max_model_len or seq.num_generated >= params.max_tokens:
        return Ending("length")
    return None


def make_outputs(
    seq: Sequence, tokens: tuple[int, ...], logprobs: tuple[PositionLogprobs, ...], ending: Ending | None
) -> Iterator[TokenOutput]:
    """One output for each choice that the sequence stands for."""
    is_first = not seq.has_output
    seq.has_output = True
    output = TokenOutput(
        request_id=seq.request.request_id,
        index=seq.index,
        token_ids=tokens,
        logprobs=logprobs,
        num_cached_tokens=seq.num_cached if is_first else 0,
        queue_seconds=seq.queue_seconds if is_first else 0.0,
        finish_reason=ending.reason if ending else None,
        stop_token_id=ending.stop_token_id if ending else None,
        error=ending.error if ending else "",
    )
    for copy in range(1, seq.copies):
        yield msgspec.structs.replace(output, index=copy)
    if seq.prompt_scores is not None and (ending is None or not ending.error):
        output = msgspec.structs.replace(output, prompt_logprobs=tuple(seq.prompt_scores))
        seq.prompt_scores = None
    yield output
