"""The shape of /v1/completions, streamed and whole, from the same events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fuseline.api.output.events import Event, Prompt, PromptInfo, TextDelta
from fuseline.api.output.logprobs import LogprobWriter
from fuseline.engine.messages import PositionLogprobs


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


@dataclass
class _Choice:
    text: str = ""
    offset: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs | None] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    is_started: bool = False


class CompletionWriter:
    """Events to chunks, or folded into one object."""

    def __init__(self, shape: Shape, prompts: list[Prompt], n: int) -> None:
        self._shape, self._prompts, self._n = shape, prompts, n
        self._choices = [_Choice() for _ in range(len(prompts) * n)]
        self._totals = Totals(prompt=sum(len(prompt.ids) for prompt in prompts))

    def chunks(self, prompt: Prompt, event: Event) -> list[dict[str, Any]]:
        index = self._take(prompt, event)
        if isinstance(event, TextDelta):
            chunk = self._delta(prompt, index, event)
            return [] if chunk is None else [self._envelope([chunk], index)]
        if isinstance(event, PromptInfo):
            return []
        end = {"index": index, "text": "", "logprobs": None, "finish_reason": event.finish_reason,
               "stop_reason": event.stop_reason}  # fmt: skip
        return [self._envelope([end], index)]

    def last_chunks(self) -> list[dict[str, Any]]:
        """The usage chunk, where it was asked for."""
        usage = self._totals.body(self._shape.shows_cached)
        return [{**self._envelope([], None), "usage": usage}] if self._shape.include_usage else []

    def fold(self, prompt: Prompt, event: Event) -> None:
        index = self._take(prompt, event)
        if isinstance(event, TextDelta):
            self._start(prompt, index)
            self._choices[index].text += event.text

    def whole(self) -> dict[str, Any]:
        """The answer that the folded events make."""
        choices = [self._whole_choice(k) for k in range(len(self._choices))]
        return {**self._envelope(choices, None), "usage": self._totals.body(self._shape.shows_cached)}

    def _take(self, prompt: Prompt, event: Event) -> int:
        if isinstance(event, PromptInfo):
            prompt.info = event
            self._totals.cached += event.num_cached_tokens
            return prompt.first
        index = prompt.first + event.index
        choice = self._choices[index]
        if isinstance(event, TextDelta):
            choice.tokens += event.token_ids
            choice.logprobs += event.logprobs
            self._totals.completion += len(event.token_ids)
        else:
            choice.finish_reason, choice.stop_reason = event.finish_reason, event.stop_reason
        return index

    def _start(self, prompt: Prompt, index: int) -> tuple[str, list[int], list[PositionLogprobs | None]]:
        """What echo puts in front of a choice's first text: text, tokens, log-probabilities."""
        choice = self._choices[index]
        if choice.is_started:
            return "", [], []
        choice.is_started = True
        if prompt.echo is None:
            return "", [], []
        choice.text += prompt.echo
        positions = prompt.info.prompt_logprobs
        return prompt.echo, (prompt.ids if positions is not None else []), list(positions or ())

    def _delta(self, prompt: Prompt, index: int, event: TextDelta) -> dict[str, Any] | None:
        echo, tokens, positions = self._start(prompt, index)
        text = echo + event.text
        if not text and not event.token_ids:
            return None
        choice = self._choices[index]
        logprobs = None
        if self._shape.wants_logprobs:
            all_tokens = [*tokens, *event.token_ids]
            logprobs = self._shape.writer.completion([*positions, *event.logprobs], all_tokens, choice.offset)
        choice.offset += len(text)
        chunk = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None, "stop_reason": None}
        return {**chunk, "token_ids": event.token_ids} if self._shape.wants_ids else chunk

    def _whole_choice(self, index: int) -> dict[str, Any]:
        choice, prompt = self._choices[index], self._prompts[index // self._n]
        prompt_positions = prompt.info.prompt_logprobs
        logprobs = None
        if self._shape.wants_logprobs:
            echoed = prompt.echo is not None and prompt_positions is not None
            tokens = [*(prompt.ids if echoed else ()), *choice.tokens]
            positions = [*(prompt_positions if echoed else ()), *choice.logprobs]
            logprobs = self._shape.writer.completion(positions, tokens, 0)
        body = {
            "index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "prompt_logprobs": None if prompt_positions is None else self._shape.writer.prompt(prompt_positions),
        }  # fmt: skip
        if self._shape.wants_ids:
            body |= {"token_ids": choice.tokens, "prompt_token_ids": prompt.ids}
        return body

    def _envelope(self, choices: list[dict[str, Any]], index: int | None) -> dict[str, Any]:
        shape = self._shape
        body: dict[str, Any] = {
            "id": shape.id, "object": "text_completion", "created": shape.created, "model": shape.model,
            "choices": choices,
        }  # fmt: skip
        if index is not None:
            usage = self._running(index) if shape.include_usage and shape.continuous_usage else None
            body["usage"] = usage
        return body

    def _running(self, index: int) -> dict[str, Any]:
        prompt = self._prompts[index // self._n]
        return Totals(len(prompt.ids), len(self._choices[index].tokens), prompt.info.num_cached_tokens).body(
            self._shape.shows_cached
        )
