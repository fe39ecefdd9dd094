"""The shape of /v1/responses, streamed and whole, from the same events."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from fuseline.api.errors import ApiError
from fuseline.api.output.events import Event, Prompt
from fuseline.api.output.framing import Framing, named_sse
from fuseline.api.output.items import Item, ItemsWriter
from fuseline.api.output.openai_completion import Shape


def error_chunk(error: ApiError) -> dict[str, Any]:
    return error.body()["error"] | {"type": "error", "sequence_number": 0}


FRAMING = Framing(named_sse, b"", error_chunk)
PREFIXES = {"reasoning": "rs_", "text": "msg_", "call": "fc_"}


class ResponsesWriter(ItemsWriter):
    """One answer as output items. `shown`: fields of the request that the response repeats."""

    def __init__(
        self, shape: Shape, prompt: Prompt, shown: Mapping[str, Any], keep: Callable[[dict[str, Any]], None]
    ) -> None:
        """`keep` takes the finished response."""
        super().__init__(shape, prompt)
        self._shown, self._keep = shown, keep
        self._ids: dict[int, str] = {}
        self._number = 0

    def chunks(self, prompt: Prompt, events: Sequence[Event]) -> list[dict[str, Any]]:
        chunks: list[dict[str, Any]] = []
        if not self._number:
            for kind in ("response.created", "response.in_progress"):
                chunks.append(self._chunk(kind, response=self._response("in_progress")))
        for event in events:
            for step, item, text in self._items.take(event):
                chunks += self._step(step, item, text)
        return chunks

    def last_chunks(self) -> list[dict[str, Any]]:
        response = self._finished()
        return [self._chunk(f"response.{response['status']}", response=response)]

    async def whole(self) -> list[bytes]:
        return [msgspec.json.encode(self._finished())]

    def _chunk(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _step(self, step: str, item: Item, text: str) -> list[dict[str, Any]]:
        at = {"output_index": len(self._items.all) - 1, "item_id": self._id(item)}
        part = {**at, "content_index": 0}
        if step == "begin":
            added = self._chunk(
                "response.output_item.added", output_index=at["output_index"], item=self._item(item, False)
            )
            if item.kind == "call":
                return [added]
            return [added, self._chunk("response.content_part.added", **part, part=self._part(item, False))]
        if step == "more":
            if item.kind == "call":
                return [self._chunk("response.function_call_arguments.delta", **at, delta=text)]
            if item.kind == "reasoning":
                return [self._chunk("response.reasoning_text.delta", **part, delta=text)]
            logprobs = self._logprobs(self._items.logprobs)
            return [self._chunk("response.output_text.delta", **part, delta=text, logprobs=logprobs)]
        return [*self._ended(item, at, part), self._chunk(
            "response.output_item.done", output_index=at["output_index"], item=self._item(item, True)
        )]  # fmt: skip

    def _ended(self, item: Item, at: dict[str, Any], part: dict[str, Any]) -> list[dict[str, Any]]:
        if item.kind == "call":
            kind = "response.function_call_arguments.done"
            return [self._chunk(kind, **at, name=item.name, arguments=item.text)]
        if item.kind == "reasoning":
            done = self._chunk("response.reasoning_text.done", **part, text=item.text)
        else:
            logprobs = self._logprobs(item.logprobs)
            done = self._chunk("response.output_text.done", **part, text=item.text, logprobs=logprobs)
        return [done, self._chunk("response.content_part.done", **part, part=self._part(item, True))]

    def _id(self, item: Item) -> str:
        return self._ids.setdefault(id(item), PREFIXES[item.kind] + uuid.uuid4().hex)

    def _item(self, item: Item, is_done: bool) -> dict[str, Any]:
        is_cut = is_done and item is self._items.all[-1] and self._is_incomplete
        status = "incomplete" if is_cut or item.is_revoked else "completed" if is_done else "in_progress"
        common = {"id": self._id(item), "status": status}
        if item.kind == "call":
            arguments = item.text if is_done else ""
            return {"type": "function_call", **common, "call_id": item.id, "name": item.name, "arguments": arguments}
        content = [self._part(item, True)] if is_done else []
        if item.kind == "reasoning":
            return {"type": "reasoning", **common, "summary": [], "content": content}
        return {"type": "message", **common, "role": "assistant", "content": content}

    def _part(self, item: Item, is_done: bool) -> dict[str, Any]:
        text = item.text if is_done else ""
        if item.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = self._logprobs(item.logprobs) if is_done else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _logprobs(self, positions: Sequence[Any]) -> list[dict[str, Any]]:
        if not self._shape.wants_logprobs:
            return []
        return self._shape.writer.chat_tokens(positions, self._shape.num_top)

    @property
    def _is_incomplete(self) -> bool:
        return self._items.done is not None and self._items.done.finish_reason == "length"

    def _finished(self) -> dict[str, Any]:
        response = self._response("incomplete" if self._is_incomplete else "completed")
        self._keep(response)
        return response

    def _response(self, status: str) -> dict[str, Any]:
        is_done = status != "in_progress"
        shape = self._shape
        return {
            "id": shape.id, "object": "response", "created_at": shape.created, "status": status,
            "background": False, "error": None, "model": shape.model,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [self._item(item, True) for item in self._items.kept] if is_done else [],
            **self._shown,
            "usage": self._usage() if is_done else None,
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        done, num_output = self._items.done, self._items.num_tokens
        return {
            "input_tokens": self._num_prompt,
            "input_tokens_details": {"cached_tokens": self._info.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": done.num_reasoning if done else 0},
            "total_tokens": self._num_prompt + num_output,
        }
