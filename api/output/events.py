"""The one event stream inside the API: a streamed answer writes it out, a whole one is its fold."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from fuseline.engine.messages import PositionLogprobs


@dataclass(slots=True)
class TextDelta:
    """New text of one choice and the tokens that made it."""

    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class Done:
    """The end of one choice."""

    index: int
    finish_reason: str
    stop_reason: str | int | None = None


@dataclass(slots=True)
class PromptInfo:
    """Facts of the prompt; they come with the first output, before its events."""

    num_cached_tokens: int = 0
    prompt_logprobs: Sequence[PositionLogprobs | None] | None = None


@dataclass
class Prompt:
    """One prompt of the request; its choices are numbered from `first`."""

    ids: array[int]
    first: int = 0
    echo: str | None = None
    info: PromptInfo = field(default_factory=PromptInfo)


Event = TextDelta | Done
