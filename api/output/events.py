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
    offsets: list[int] = field(default_factory=list)
    """With log-probabilities: characters of the choice's text before each token, whether they have been sent or not."""


@dataclass(slots=True)
class ReasoningDelta:
    """New text of one choice's reasoning and the tokens that made it."""

    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class ToolCallDelta:
    """More of one tool call's arguments, as JSON text; id and name come with the first of it."""

    index: int
    call: int
    """Number of the call in its choice."""
    arguments: str
    id: str | None = None
    name: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class CallRevoked:
    """A call turned out to be none after its beginning was told; its text follows as content."""

    index: int
    call: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class Done:
    """The end of one choice."""

    index: int
    finish_reason: str
    stop_reason: str | int | None = None
    num_reasoning: int = 0
    """Tokens of reasoning."""


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


Part = TextDelta | ReasoningDelta | ToolCallDelta | CallRevoked
Event = Part | Done
