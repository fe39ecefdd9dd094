"""The shape of /v1/completions, streamed and whole, from the same events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fuseline.api.output.events import Event, Prompt, PromptInfo, TextDelta
from fuseline.api.output.logprobs import (
    SLICE,
    CompletionLogprobs,
    JsonList,
    LogprobWriter,
    encode_pieces,
    encode_slices,
)
from fuseline.api.output.pace import Turns
from fuseline.engine.messages import PositionLogprobs


@dataclass
class Shape:
    """Fields that all chunks of one answer share, and the options of the request."""

    id: str
    created: int
    model: str
    writer: LogprobWriter
    wants_logprobs: bool = False
    num_top: int = 0
    wants_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    shows_cached: bool = False
    role: str = "assistant"
    echo: str = ""
    keeps_empty: bool = True
    """Content that is empty is "" and not null."""
    counts_reasoning: bool = False
    turns: Turns = field(default_factory=Turns)
    """Shared by all answers of a server."""


@dataclass
class Totals:
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int | None = None
    """None does not show it."""

    def body(self, shows_cached: bool) -> dict[str, Any]:
        details = {"cached_tokens": self.cached} if shows_cached else None
        usage = {
            "prompt_tokens": self.prompt, "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion, "prompt_tokens_details": details,
        }  # fmt: skip
        if self.reasoning is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning}
        return usage


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    is_started: bool = False


class CompletionWriter:
    """Events to chunks, or folded into one object."""

    def __init__(self, shape: Shape, prompts: list[Prompt], n: int) -> None:
        self._shape, self._prompts, self._n = shape, prompts, n
        self._choices = [_Choice() for _ in range(len(prompts) * n)]
        self._totals = Totals(prompt=sum(len(prompt.ids) for prompt in prompts))
        self._turns = shape.turns
        self._echoes: dict[int, CompletionLogprobs] = {}
        """Log-probabilities of the prompts that are repeated, by the number of their first choice."""

    async def open(self, prompt: Prompt, info: PromptInfo) -> None:
        """Take the facts of the prompt, before any of its text; what echo shows of them is encoded once, in slices."""
        prompt.info = info
        self._totals.cached += info.num_cached_tokens
        if prompt.echo is not None and self._shape.wants_logprobs and info.prompt_logprobs is not None:
            made = CompletionLogprobs(self._shape.writer)
            offsets = self._shape.writer.prompt_offsets(prompt.ids, prompt.echo)
            await made.extend(info.prompt_logprobs, prompt.ids, offsets, self._turns)
            self._echoes[prompt.first] = made

    def chunks(self, prompt: Prompt, events: Sequence[Event]) -> list[dict[str, Any]]:
        return self._chunks(prompt, events, {})

    def _chunks(
        self, prompt: Prompt, events: Sequence[Event], encoded: Mapping[int, dict[str, JsonList]]
    ) -> list[dict[str, Any]]:
        """`encoded`: log-probabilities of events by their place, where they have been encoded already."""
        choices: list[dict[str, Any]] = []
        for k, event in enumerate(events):
            index = self._take(prompt, event)
            if isinstance(event, TextDelta):
                delta = self._delta(prompt, index, event, encoded.get(k))
                choices += [] if delta is None else [delta]
                continue
            if not choices:
                choices.append({"index": index, "text": "", "logprobs": None})
            choices[-1] |= {"finish_reason": event.finish_reason, "stop_reason": event.stop_reason}
        return [self._envelope([choice], choice["index"]) for choice in choices]

    def is_long(self, prompt: Prompt, events: Sequence[Event]) -> bool:
        """Whether the chunks of events take long: they repeat the prompt, or have the scores of many tokens."""
        texts = (event for event in events if isinstance(event, TextDelta))
        return any(self._repeats(prompt, event) or len(event.logprobs) > SLICE for event in texts)

    async def long_chunks(self, prompt: Prompt, events: Sequence[Event]) -> list[dict[str, Any]]:
        """As `chunks`, in slices."""
        await self._turns.rest()
        encoded: dict[int, dict[str, JsonList]] = {}
        for k, event in enumerate(events):
            if isinstance(event, TextDelta) and self._shape.wants_logprobs:
                starts = not encoded and self._repeats(prompt, event)
                made = self._echo_logprobs(prompt) if starts else CompletionLogprobs(self._shape.writer)
                await made.extend(event.logprobs, event.token_ids, _behind_echo(prompt, event), self._turns)
                encoded[k] = made.lists()
        return self._chunks(prompt, events, encoded)

    def _repeats(self, prompt: Prompt, event: TextDelta) -> bool:
        """Whether echo puts the prompt in front of the event."""
        return prompt.echo is not None and not self._choices[prompt.first + event.index].is_started

    def last_chunks(self) -> list[dict[str, Any]]:
        """The usage chunk, where it was asked for."""
        usage = self._totals.body(self._shape.shows_cached)
        return [{**self._envelope([], None), "usage": usage}] if self._shape.include_usage else []

    def fold(self, prompt: Prompt, events: Sequence[Event]) -> None:
        for event in events:
            index = self._take(prompt, event)
            if isinstance(event, TextDelta):
                self._start(prompt, index)
                self._choices[index].text.append(event.text)

    async def whole(self) -> list[bytes]:
        """Pieces of the answer that the folded events make, as JSON."""
        pieces = [msgspec.json.encode(self._common())[:-1] + b',"choices":[']
        for index in range(len(self._choices)):
            await self._turns.rest()
            choice = encode_pieces(await self._whole_choice(index))
            pieces += [b",", *choice] if index else choice
        tail = {"usage": self._totals.body(self._shape.shows_cached), "system_fingerprint": None}
        return [*pieces, b"]," + msgspec.json.encode(tail)[1:]]

    def _take(self, prompt: Prompt, event: Event) -> int:
        index = prompt.first + event.index
        choice = self._choices[index]
        if isinstance(event, TextDelta):
            choice.tokens += event.token_ids
            choice.logprobs += event.logprobs
            choice.offsets += _behind_echo(prompt, event)
            self._totals.completion += len(event.token_ids)
        else:
            choice.finish_reason, choice.stop_reason = event.finish_reason, event.stop_reason
        return index

    def _start(self, prompt: Prompt, index: int) -> str | None:
        """Text that echo puts in front of a choice's first one; None where there is none."""
        choice = self._choices[index]
        if choice.is_started or prompt.echo is None:
            return None
        choice.is_started = True
        choice.text.append(prompt.echo)
        return prompt.echo

    def _delta(
        self, prompt: Prompt, index: int, event: TextDelta, logprobs: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """The choice of a chunk with new text, if there is any; `logprobs` where they have been encoded already."""
        text = (self._start(prompt, index) or "") + event.text
        if not text and not event.token_ids:
            return None
        is_first = len(self._choices[index].tokens) == len(event.token_ids)
        if self._shape.wants_logprobs and logprobs is None:
            offsets = _behind_echo(prompt, event)
            logprobs = self._shape.writer.completion(event.logprobs, event.token_ids, offsets)
        chunk = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None, "stop_reason": None}
        if self._shape.wants_ids:
            chunk |= {"token_ids": event.token_ids, "prompt_token_ids": prompt.ids.tolist() if is_first else None}
        return chunk

    async def _whole_choice(self, index: int) -> dict[str, Any]:
        choice, prompt = self._choices[index], self._prompts[index // self._n]
        body = {
            "index": index, "text": "".join(choice.text), "logprobs": await self._whole_logprobs(choice, prompt),
            "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason,
            "prompt_logprobs": await self._prompt_logprobs(prompt),
        }  # fmt: skip
        if self._shape.wants_ids:
            body |= {"token_ids": choice.tokens, "prompt_token_ids": prompt.ids.tolist()}
        return body

    async def _whole_logprobs(self, choice: _Choice, prompt: Prompt) -> dict[str, JsonList] | None:
        if not self._shape.wants_logprobs:
            return None
        made = self._echo_logprobs(prompt)
        await made.extend(choice.logprobs, choice.tokens, choice.offsets, self._turns)
        return made.lists()

    def _echo_logprobs(self, prompt: Prompt) -> CompletionLogprobs:
        """The beginning of a choice's log-probabilities: those of the prompt, if they are repeated, else none."""
        echo = self._echoes.get(prompt.first)
        return CompletionLogprobs(self._shape.writer) if echo is None else echo.copy()

    async def _prompt_logprobs(self, prompt: Prompt) -> JsonList | None:
        positions = prompt.info.prompt_logprobs
        return None if positions is None else await encode_slices(self._shape.writer.prompt, positions, self._turns)

    def _envelope(self, choices: list[dict[str, Any]], index: int | None) -> dict[str, Any]:
        shape = self._shape
        body: dict[str, Any] = {**self._common(), "choices": choices}
        if index is not None:
            usage = self._running(index) if shape.include_usage and shape.continuous_usage else None
            body["usage"] = usage
        return body

    def _common(self) -> dict[str, Any]:
        shape = self._shape
        return {"id": shape.id, "object": "text_completion", "created": shape.created, "model": shape.model}

    def _running(self, index: int) -> dict[str, Any]:
        prompt = self._prompts[index // self._n]
        return Totals(len(prompt.ids), len(self._choices[index].tokens), prompt.info.num_cached_tokens).body(
            self._shape.shows_cached
        )


def _behind_echo(prompt: Prompt, event: TextDelta) -> list[int]:
    """Characters before each token of a delta, those of an echoed prompt among them."""
    begin = len(prompt.echo or "")
    return [begin + offset for offset in event.offsets]
