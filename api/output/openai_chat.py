"""The shape of /v1/chat/completions, streamed and whole, from the same events."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from fuseline.api.output.events import Done, Event, Prompt, PromptInfo, TextDelta
from fuseline.api.output.logprobs import SLICE, JsonList, encode_pieces, encode_slices
from fuseline.api.output.openai_completion import Shape, Totals
from fuseline.engine.messages import PositionLogprobs


class ChatWriter:
    """One conversation with n choices."""

    def __init__(self, shape: Shape, prompt: Prompt, n: int) -> None:
        self._shape, self._ids, self._n = shape, prompt.ids, n
        self._totals = Totals(prompt=len(prompt.ids))
        self._info = PromptInfo()
        self._text = [[shape.echo] for _ in range(n)]
        self._turns = shape.turns
        self._tokens: list[list[int]] = [[] for _ in range(n)]
        self._logprobs: list[list[PositionLogprobs]] = [[] for _ in range(n)]
        self._ends: list[Done | None] = [None] * n
        self._is_started = False

    async def open(self, prompt: Prompt, info: PromptInfo) -> None:
        self._info = info
        self._totals.cached += info.num_cached_tokens

    def chunks(self, prompt: Prompt, event: Event) -> list[dict[str, Any]]:
        return self._chunks(event)

    def is_long(self, prompt: Prompt, event: Event) -> bool:
        """Whether the chunk of an event takes long: it has the scores of many tokens."""
        return isinstance(event, TextDelta) and len(event.logprobs) > SLICE

    async def long_chunks(self, prompt: Prompt, event: TextDelta) -> list[dict[str, Any]]:
        """As `chunks`, in slices."""
        return self._chunks(event, await self._encode(event.logprobs))

    def _chunks(self, event: Event, logprobs: JsonList | None = None) -> list[dict[str, Any]]:
        """`logprobs`: those of the event, where they have been encoded already."""
        self._take(event)
        chunks = [] if self._is_started else self._opening()
        self._is_started = True
        if isinstance(event, TextDelta) and (event.text or event.token_ids):
            choice: dict[str, Any] = {"index": event.index, "delta": {"content": event.text}, "finish_reason": None}
            if logprobs is not None:
                choice["logprobs"] = {"content": logprobs}
            elif self._shape.wants_logprobs:
                choice["logprobs"] = self._shape.writer.chat(event.logprobs, self._shape.num_top)
            if self._shape.wants_ids:
                choice["token_ids"] = event.token_ids
            chunks.append(self._envelope(choice))
        elif isinstance(event, Done):
            choice = {"index": event.index, "delta": {}, "finish_reason": event.finish_reason}
            if event.stop_reason is not None:
                choice["stop_reason"] = event.stop_reason
            chunks.append(self._envelope(choice))
        return chunks

    def last_chunks(self) -> list[dict[str, Any]]:
        """The usage chunk, where it was asked for."""
        usage = self._totals.body(self._shape.shows_cached)
        return [{**self._common(), "choices": [], "usage": usage}] if self._shape.include_usage else []

    def fold(self, prompt: Prompt, event: Event) -> None:
        self._take(event)
        if isinstance(event, TextDelta):
            self._text[event.index].append(event.text)

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
        tail = {"usage": self._totals.body(self._shape.shows_cached), "prompt_logprobs": scores}
        return {**tail, "prompt_token_ids": self._ids.tolist()} if self._shape.wants_ids else tail

    def _take(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self._tokens[event.index] += event.token_ids
            self._logprobs[event.index] += event.logprobs
            self._totals.completion += len(event.token_ids)
        else:
            self._ends[event.index] = event

    def _opening(self) -> list[dict[str, Any]]:
        """A role chunk per choice, then what echo repeats."""
        role = [
            {"index": k, "delta": {"role": self._shape.role, "content": ""}, "logprobs": None, "finish_reason": None}
            for k in range(self._n)
        ]
        echo = [
            {"index": k, "delta": {"content": self._shape.echo}, "logprobs": None, "finish_reason": None}
            for k in range(self._n if self._shape.echo else 0)
        ]
        return [self._envelope(choice, is_opening=True) for choice in (*role, *echo)]

    async def _whole_choice(self, index: int) -> dict[str, Any]:
        shape, end = self._shape, self._ends[index]
        logprobs = None
        if shape.wants_logprobs:
            logprobs = {"content": await self._encode(self._logprobs[index])}
        choice = {
            "index": index,
            "message": {"role": shape.role, "reasoning_content": None, "content": "".join(self._text[index])},
            "logprobs": logprobs,
            "finish_reason": end.finish_reason if end else None,
            "stop_reason": end.stop_reason if end else None,
        }
        return {**choice, "token_ids": self._tokens[index]} if shape.wants_ids else choice

    def _envelope(self, choice: dict[str, Any], is_opening: bool = False) -> dict[str, Any]:
        body = {**self._common(), "choices": [choice]}
        if self._shape.include_usage and self._shape.continuous_usage:
            count = 0 if is_opening else len(self._tokens[choice["index"]])
            body["usage"] = Totals(len(self._ids), count, self._info.num_cached_tokens).body(self._shape.shows_cached)
        return body

    def _common(self) -> dict[str, Any]:
        shape = self._shape
        return {"id": shape.id, "object": "chat.completion.chunk", "created": shape.created, "model": shape.model}
