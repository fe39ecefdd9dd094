"""The shape of /v1/completions, streamed and whole, from the same events."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from fuseline.api.output.events import Done, Event, PromptInfo, TextDelta
from fuseline.api.output.logprobs import CompletionLogprobs, LogprobWriter, Positions, encode_slices
from fuseline.api.output.pace import Pace


@dataclass
class Shape:
    """What all chunks of one answer share, and what was asked for."""

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


@dataclass
class Prompt:
    """One prompt of the request; its choices are numbered from `first`."""

    ids: array[int]
    first: int
    echo: str | None = None
    info: PromptInfo = field(default_factory=PromptInfo)
    scores: msgspec.Raw | None = None
    """prompt_logprobs of a whole answer."""


@dataclass
class Totals:
    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def body(self, shows_cached: bool) -> dict[str, Any]:
        details = {"cached_tokens": self.cached} if shows_cached and self.cached else None
        return {
            "prompt_tokens": self.prompt, "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion, "prompt_tokens_details": details,
        }  # fmt: skip


Numbered = AsyncIterator[tuple[Prompt, Event]]


@dataclass
class _Choice:
    logprobs: CompletionLogprobs
    """Of a whole answer."""
    offset: int = 0
    """Characters that a stream has sent."""
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    is_started: bool = False


class CompletionWriter:
    """Turns events into chunks; `whole` folds the same events into one object."""

    def __init__(self, shape: Shape, prompts: list[Prompt], n: int) -> None:
        self._shape, self._prompts, self._n = shape, prompts, n
        self._choices = [_Choice(CompletionLogprobs(shape.writer)) for _ in range(len(prompts) * n)]
        self._totals = Totals(prompt=sum(len(prompt.ids) for prompt in prompts))
        self._pace = Pace()

    async def chunks(self, events: Numbered) -> AsyncIterator[dict[str, Any]]:
        async for prompt, event in events:
            index = self._take(prompt, event)
            if isinstance(event, TextDelta):
                chunk = await self._delta(prompt, index, event)
                if chunk is not None:
                    yield self._envelope([chunk], index)
            elif isinstance(event, Done):
                end = {"index": index, "text": "", "logprobs": None, "finish_reason": event.finish_reason,
                       "stop_reason": event.stop_reason}  # fmt: skip
                yield self._envelope([end], index)
        if self._shape.include_usage:
            yield {**self._envelope([], None), "usage": self._totals.body(self._shape.shows_cached)}

    async def whole(self, events: Numbered) -> list[bytes]:
        """Pieces of the JSON body."""
        async for prompt, event in events:
            index = self._take(prompt, event)
            if isinstance(event, TextDelta):
                choice = self._choices[index]
                echo, tokens, positions = self._start(prompt, index)
                choice.text += [echo, event.text]
                choice.tokens += event.token_ids
                if self._shape.wants_logprobs:
                    await choice.logprobs.extend(positions, tokens, self._pace)
                    await choice.logprobs.extend(event.logprobs, event.token_ids, self._pace)
            elif isinstance(event, PromptInfo):
                await self._write_scores(prompt)
            await self._pace.rest()
        pieces = [msgspec.json.encode(self._common())[:-1] + b',"choices":[']
        for index in range(len(self._choices)):
            pieces.append((b"," if index else b"") + msgspec.json.encode(self._whole_choice(index)))
            await self._pace.rest()
        usage = msgspec.json.encode({"usage": self._totals.body(self._shape.shows_cached)})
        return [*pieces, b"]," + usage[1:]]

    async def _write_scores(self, prompt: Prompt) -> None:
        """Encodes prompt_logprobs as soon as they come; they are kept only where echo shows them with the text."""
        positions = prompt.info.prompt_logprobs
        if positions is None:
            return
        prompt.scores = await encode_slices(self._shape.writer.prompt, positions, self._pace)
        if prompt.echo is None:
            prompt.info = replace(prompt.info, prompt_logprobs=None)

    def _take(self, prompt: Prompt, event: Event) -> int:
        if isinstance(event, PromptInfo):
            prompt.info = event
            self._totals.cached += event.num_cached_tokens
            return prompt.first
        index = prompt.first + event.index
        choice = self._choices[index]
        if isinstance(event, TextDelta):
            choice.num_tokens += len(event.token_ids)
            self._totals.completion += len(event.token_ids)
        else:
            choice.finish_reason, choice.stop_reason = event.finish_reason, event.stop_reason
        return index

    def _start(self, prompt: Prompt, index: int) -> tuple[str, array[int] | list[int], Positions]:
        """What echo puts in front of a choice's first text: text, tokens, log-probabilities."""
        choice = self._choices[index]
        if choice.is_started:
            return "", [], []
        choice.is_started = True
        if prompt.echo is None:
            return "", [], []
        positions = prompt.info.prompt_logprobs
        return prompt.echo, (prompt.ids if positions is not None else []), positions or ()

    async def _delta(self, prompt: Prompt, index: int, event: TextDelta) -> dict[str, Any] | None:
        echo, tokens, positions = self._start(prompt, index)
        text = echo + event.text
        if not text and not event.token_ids:
            return None
        choice = self._choices[index]
        logprobs = None
        if self._shape.wants_logprobs:
            made = CompletionLogprobs(self._shape.writer, choice.offset)
            await made.extend(positions, tokens, self._pace)
            await made.extend(event.logprobs, event.token_ids, self._pace)
            logprobs = made.raw()
        choice.offset += len(text)
        chunk = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None, "stop_reason": None}
        return {**chunk, "token_ids": event.token_ids} if self._shape.wants_ids else chunk

    def _whole_choice(self, index: int) -> dict[str, Any]:
        choice, prompt = self._choices[index], self._prompts[index // self._n]
        body = {
            "index": index, "text": "".join(choice.text),
            "logprobs": choice.logprobs.raw() if self._shape.wants_logprobs else None,
            "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason,
            "prompt_logprobs": prompt.scores,
        }  # fmt: skip
        if self._shape.wants_ids:
            body |= {"token_ids": choice.tokens, "prompt_token_ids": prompt.ids.tolist()}
        return body

    def _envelope(self, choices: list[dict[str, Any]], index: int | None) -> dict[str, Any]:
        shape = self._shape
        body = {**self._common(), "choices": choices}
        if index is not None:
            usage = self._running(index) if shape.include_usage and shape.continuous_usage else None
            body["usage"] = usage
        return body

    def _common(self) -> dict[str, Any]:
        shape = self._shape
        return {"id": shape.id, "object": "text_completion", "created": shape.created, "model": shape.model}

    def _running(self, index: int) -> dict[str, Any]:
        prompt = self._prompts[index // self._n]
        return Totals(len(prompt.ids), self._choices[index].num_tokens, prompt.info.num_cached_tokens).body(
            self._shape.shows_cached
        )
