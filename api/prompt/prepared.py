"""A request that is ready for the engine, as typed messages: they also cross the border of a worker process."""

from __future__ import annotations

from array import array
from typing import Any, Literal

import msgspec

from fuseline.engine.params import SamplingParams


class BeamOptions(msgspec.Struct, frozen=True):
    """Beam search in place of sampling. The width is the number of choices."""

    length_penalty: float = 1.0
    """A hypothesis counts its log-probability over its length, prompt included, to this power."""


class ParseOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How reasoning and tool calls are found in the text of an answer."""

    tools: tuple[tuple[str, Any], ...] = ()
    """(name, schema of its arguments) of each tool; for choice named the one function."""
    choice: Literal["none", "auto", "required", "named"] = "none"
    is_limited: bool = False
    """Calls of tools that are not among these are text."""
    is_parallel: bool = True
    shows_reasoning: bool = True
    start: Literal["open", "closed", ""] = ""
    """Where the prompt leaves the answer: inside of reasoning, behind it, or unknown."""


class AnswerOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Options of the answer, the same for all prompts and choices of a request."""

    n: int = 1
    """Choices of each prompt that are shown; more may be generated (best_of)."""
    beams: BeamOptions | None = None
    parse: ParseOptions | None = None
    """None where an answer's text is content alone."""
    shown: dict[str, Any] | None = None
    """Fields of the request that the answer repeats."""
    items: list[Any] | None = None
    """Input of the request, kept for those that go on from the answer."""
    stream: bool = False
    is_one_event: bool = False
    """A stream of one event that holds the whole answer: what is chosen at the end has no beginning to send."""
    include_usage: bool = False
    continuous_usage: bool = False
    num_logprobs: int | None = None
    """Alternatives shown for each token; None shows no log-probabilities."""
    wants_ids: bool = False
    shows_ids: bool | None = None
    """Tokens of log-probabilities as token_id:N; None is the server's default."""
    stops: tuple[str, ...] = ()
    includes_stop: bool = False
    skips_special: bool = True
    priority: int = 0
    cache_salt: str = ""
    request_id: str | None = None
    role: str = "assistant"
    echo: str = ""
    """Text in front of a chat's answer."""


class PreparedPrompt(msgspec.Struct, frozen=True, array_like=True):
    packed_ids: bytes
    """int32 token ids."""
    max_tokens: int
    echo: str | None = None
    """Text in front of a completion."""

    @property
    def ids(self) -> array[int]:
        return array("i", self.packed_ids)


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """Prompts with their common sampling settings."""

    prompts: tuple[PreparedPrompt, ...]
    params: SamplingParams
    """Sampling parameters of the first prompt; those of the others differ in max_tokens."""
    answer: AnswerOptions
    text: str | None = None
    """The prompt as the log shows it, where it was rendered and not cut."""
    unknown: tuple[str, ...] = ()
    """Names of fields that were ignored."""
    trace_headers: dict[str, str] = {}
    """W3C Trace Context of the request."""

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.params.n


class Written(msgspec.Struct, tag="written"):
    """An answer that needs no engine, as the pieces of a JSON body."""

    pieces: list[bytes]
    unknown: tuple[str, ...] = ()


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """An ApiError."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None


Reply = Prepared | Written | Refused
