"""The shape of /v1/chat/completions, streamed and whole, from the same events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from fuseline.api.output.events import Done, Event, Part, Prompt, PromptInfo
from fuseline.api.output.logprobs import SLICE, JsonList, encode_pieces, encode_slices
from fuseline.api.output.message import Message, delta_of, is_empty
from fuseline.api.output.openai_completion import Shape, Totals
from fuseline.engine.messages import PositionLogprobs


class ChatWriter:
    """One conversation with n choices."""

    def __init__(self, shape: Shape, prompt: Prompt, n: int) -> None:
        self._shape, self._ids, self._n = shape, prompt.ids, n
        self._totals = Totals(prompt=len(prompt.ids), reasoning=0 if shape.counts_reasoning else None)
        self._info = PromptInfo()
        self._messages = [Message(shape.echo) for _ in range(n)]
        self._turns = shape.turns
        self._tokens: list[list[int]] = [[] for _ in range(n)]
        self._logprobs: list[list[PositionLogprobs]] = [[] for _ in range(n)]
        self._ends: list[Done | None] = [None] * n
        self._is_started = False

    async def open(self, prompt: Prompt, info: PromptInfo) -> None:
        self._info = info
        self._totals.cached += info.num_cached_tokens

    def chunks(self, prompt: Prompt, events: Sequence[Event]) -> list[dict[str, Any]]:
        return self._chunks(events, {})

    def is_long(self, prompt: Prompt, events: Sequence[Event]) -> bool:
        """Whether the chunks of events take long: they have the scores of many tokens."""
        return any(not isinstance(event, Done) and len(event.logprobs) > SLICE for event in events)

    async def long_chunks(self, prompt: Prompt, events: Sequence[Event]) -> list[dict[str, Any]]:
        """As `chunks`, in slices."""
        wanted = [(k, event) for k, event in enumerate(events) if not isinstance(event, Done)]
        return self._chunks(events, {k: await self._encode(event.logprobs) for k, event in wanted})

    def _chunks(self, events: Sequence[Event], encoded: Mapping[int, JsonList]) -> list[dict[str, Any]]:
        """`encoded`: log-probabilities of events by their place, where they have been encoded already."""
        choices: list[dict[str, Any]] = []
        for k, event in enumerate(events):
            self._take(event)
            if isinstance(event, Done):
                _finish(choices, event)
            elif event.token_ids or not is_empty(event):
                choices.append(self._delta(event, encoded.get(k)))
        opening = [] if self._is_started else self._opening()
        self._is_started = True
        return opening + [self._envelope(choice) for choice in choices]

    def last_chunks(self) -> list[dict[str, Any]]:
        """The usage chunk, where it was asked for."""
        usage = self._totals.body(self._shape.shows_cached)
        return [{**self._common(), "choices": [], "usage": usage}] if self._shape.include_usage else []

    def fold(self, prompt: Prompt, events: Sequence[Event]) -> None:
        for event in events:
            self._take(event)
            self._messages[event.index].take(event)

    async def whole(self) -> list[bytes]:
        """Pieces of the answer that the folded events make, as JSON."""
        pieces = [msgspec.json.encode({**self._common(), "object": "chat.completion"})[:-1] + b',"choices":[']
        for index in range(self._n):
            await self._turns.rest()
            choice = encode_pieces(await self._whole_choice(index))
            pieces += [b",", *choice] if index else choice
        first, *tail = encode_pieces(await self._tail())
        return [*pieces, b"]," + first[1:], *tail]

    async def _encode(self, positions: Sequence[PositionLogprobs]) -> JsonList:
        write = partial(self._shape.writer.chat_tokens, num_top=self._shape.num_top)
        return await encode_slices(write, positions, self._turns)

    async def _tail(self) -> dict[str, Any]:
        """The fields that follow the choices."""
        positions = self._info.prompt_logprobs
        scores = None
        if positions is not None:
            scores = await encode_slices(self._shape.writer.prompt, positions, self._turns)
        usage = self._totals.body(self._shape.shows_cached)
        tail = {"usage": usage, "service_tier": None, "system_fingerprint": None, "prompt_logprobs": scores}
        return {**tail, "prompt_token_ids": self._ids.tolist()} if self._shape.wants_ids else tail

    def _take(self, event: Event) -> None:
        if isinstance(event, Done):
            self._ends[event.index] = event
            if self._totals.reasoning is not None:
                self._totals.reasoning += event.num_reasoning
        else:
            self._tokens[event.index] += event.token_ids
            self._logprobs[event.index] += event.logprobs
            self._totals.completion += len(event.token_ids)

    def _delta(self, event: Part, encoded: JsonList | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": event.index, "delta": delta_of(event), "finish_reason": None}
        if self._shape.wants_logprobs and encoded is not None:
            choice["logprobs"] = {"content": encoded}
        elif self._shape.wants_logprobs:
            choice["logprobs"] = self._shape.writer.chat(event.logprobs, self._shape.num_top)
        if self._shape.wants_ids:
            choice["token_ids"] = event.token_ids
        return choice

    def _opening(self) -> list[dict[str, Any]]:
        """A role chunk per choice, the first of them with the prompt's tokens, then what echo repeats."""
        role = [
            {"index": k, "delta": {"role": self._shape.role, "content": ""}, "logprobs": None, "finish_reason": None}
            for k in range(self._n)
        ]
        echo = [
            {"index": k, "delta": {"content": self._shape.echo}, "logprobs": None, "finish_reason": None}
            for k in range(self._n if self._shape.echo else 0)
        ]
        chunks = [self._envelope(choice, is_opening=True) for choice in (*role, *echo)]
        if self._shape.wants_ids:
            chunks[0]["prompt_token_ids"] = self._ids.tolist()
        return chunks

    async def _whole_choice(self, index: int) -> dict[str, Any]:
        shape, end = self._shape, self._ends[index]
        logprobs = None
        if shape.wants_logprobs:
            logprobs = {"content": await self._encode(self._logprobs[index]), "refusal": None}
        choice = {
            "index": index,
            "message": self._messages[index].body(shape.role, shape.keeps_empty),
            "logprobs": logprobs,
            "finish_reason": end.finish_reason if end else None,
            "stop_reason": end.stop_reason if end else None,
        }
        return {**choice, "token_ids": self._tokens[index]} if shape.wants_ids else choice

    def _envelope(self, choice: dict[str, Any], is_opening: bool = False) -> dict[str, Any]:
        body = {**self._common(), "choices": [choice]}
        if self._shape.include_usage:
            body["usage"] = None
        if self._shape.include_usage and self._shape.continuous_usage:
            count = 0 if is_opening else len(self._tokens[choice["index"]])
            body["usage"] = Totals(len(self._ids), count, self._info.num_cached_tokens).body(self._shape.shows_cached)
        return body

    def _common(self) -> dict[str, Any]:
        shape = self._shape
        return {"id": shape.id, "object": "chat.completion.chunk", "created": shape.created, "model": shape.model}


def _finish(choices: list[dict[str, Any]], end: Done) -> None:
    """Put the end of a choice into its last chunk, or into an empty one of its own."""
    if not choices or choices[-1]["index"] != end.index:
        choices.append({"index": end.index, "delta": {"content": ""}, "finish_reason": None})
    choices[-1]["finish_reason"] = end.finish_reason
    if end.stop_reason is not None:
        choices[-1]["stop_reason"] = end.stop_reason
