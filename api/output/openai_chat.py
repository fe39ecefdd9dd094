"""The shape of /v1/chat/completions, streamed and whole, from the same events."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from fuseline.api.output.events import Done, Event, PromptInfo, TextDelta
from fuseline.api.output.logprobs import JsonList, encode_slices
from fuseline.api.output.openai_completion import Shape, Totals
from fuseline.api.output.pace import Pace


class ChatWriter:
    """One conversation with n choices."""

    def __init__(self, shape: Shape, prompt_ids: array[int], n: int) -> None:
        self._shape, self._ids, self._n = shape, prompt_ids, n
        self._totals = Totals(prompt=len(prompt_ids))
        self._info = PromptInfo()
        self._text = [[shape.echo] for _ in range(n)]
        self._tokens: list[list[int]] = [[] for _ in range(n)]
        self._logprobs = [JsonList() for _ in range(n)]
        self._ends: list[Done | None] = [None] * n
        self._pace = Pace()

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncIterator[dict[str, Any]]:
        is_started = False
        async for event in events:
            self._take(event)
            if not is_started:
                is_started = True
                for chunk in self._opening():
                    yield chunk
                    await self._pace.rest()
            if isinstance(event, TextDelta) and (event.text or event.token_ids):
                choice: dict[str, Any] = {"index": event.index, "delta": {"content": event.text}, "finish_reason": None}
                if self._shape.wants_logprobs:
                    choice["logprobs"] = self._shape.writer.chat(event.logprobs, self._shape.num_top)
                await self._pace.rest()
                if self._shape.wants_ids:
                    choice["token_ids"] = event.token_ids
                yield self._envelope(choice)
            elif isinstance(event, Done):
                choice = {"index": event.index, "delta": {}, "finish_reason": event.finish_reason}
                if event.stop_reason is not None:
                    choice["stop_reason"] = event.stop_reason
                yield self._envelope(choice)
        if self._shape.include_usage:
            yield {**self._common(), "choices": [], "usage": self._totals.body(self._shape.shows_cached)}

    async def whole(self, events: AsyncIterator[Event]) -> list[bytes]:
        """Pieces of the JSON body."""
        shape = self._shape
        async for event in events:
            self._take(event)
            if isinstance(event, TextDelta):
                self._text[event.index].append(event.text)
                if shape.wants_logprobs:
                    self._logprobs[event.index].extend(shape.writer.chat(event.logprobs, shape.num_top)["content"])
            await self._pace.rest()
        pieces = [msgspec.json.encode({**self._common(), "object": "chat.completion"})[:-1] + b',"choices":[']
        for index in range(self._n):
            pieces.append((b"," if index else b"") + msgspec.json.encode(self._whole_choice(index)))
            await self._pace.rest()
        return [*pieces, b"]," + msgspec.json.encode(await self._tail())[1:]]

    async def _tail(self) -> dict[str, Any]:
        """What stands behind the choices."""
        positions = self._info.prompt_logprobs
        scores = None
        if positions is not None:
            scores = await encode_slices(self._shape.writer.prompt, positions, self._pace)
        tail = {"usage": self._totals.body(self._shape.shows_cached), "prompt_logprobs": scores}
        return {**tail, "prompt_token_ids": self._ids.tolist()} if self._shape.wants_ids else tail

    def _take(self, event: Event) -> None:
        if isinstance(event, PromptInfo):
            self._info = event
            self._totals.cached += event.num_cached_tokens
        elif isinstance(event, TextDelta):
            self._tokens[event.index] += event.token_ids
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

    def _whole_choice(self, index: int) -> dict[str, Any]:
        end = self._ends[index]
        content = self._logprobs[index].raw() if self._shape.wants_logprobs else None
        choice = {
            "index": index,
            "message": {"role": self._shape.role, "reasoning_content": None, "content": "".join(self._text[index])},
            "logprobs": None if content is None else {"content": content},
            "finish_reason": end.finish_reason if end else None,
            "stop_reason": end.stop_reason if end else None,
        }
        return {**choice, "token_ids": self._tokens[index]} if self._shape.wants_ids else choice

    def _envelope(self, choice: dict[str, Any], is_opening: bool = False) -> dict[str, Any]:
        body = {**self._common(), "choices": [choice]}
        if self._shape.include_usage and self._shape.continuous_usage:
            count = 0 if is_opening else len(self._tokens[choice["index"]])
            body["usage"] = Totals(len(self._ids), count, self._info.num_cached_tokens).body(self._shape.shows_cached)
        return body

    def _common(self) -> dict[str, Any]:
        shape = self._shape
        return {"id": shape.id, "object": "chat.completion.chunk", "created": shape.created, "model": shape.model}
