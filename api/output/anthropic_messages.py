"""The shape of /v1/messages, streamed and whole, from the same events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from fuseline.api.errors import ApiError
from fuseline.api.output.events import Event, Prompt
from fuseline.api.output.framing import Framing, named_sse
from fuseline.api.output.items import Item, ItemsWriter
from fuseline.api.output.openai_completion import Shape

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "abort": "end_turn"}


def error_body(error: ApiError) -> dict[str, Any]:
    """That API's own; it has no place for the field's name but the message."""
    kind = KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    message = error.body()["error"]["message"]
    named = f"{error.param}: {message}" if error.param and error.param not in message else message
    return {"type": "error", "error": {"type": kind, "message": named}}


FRAMING = Framing(named_sse, b"", error_body)


class MessagesWriter(ItemsWriter):
    """One answer as blocks."""

    def __init__(self, shape: Shape, prompt: Prompt) -> None:
        super().__init__(shape, prompt)
        self._is_started = False

    def chunks(self, prompt: Prompt, events: Sequence[Event]) -> list[dict[str, Any]]:
        chunks = [] if self._is_started else [{"type": "message_start", "message": self._message([], None, None)}]
        self._is_started = True
        for event in events:
            for step, item, text in self._items.take(event):
                chunks += self._block(step, item, text)
        return chunks

    def last_chunks(self) -> list[dict[str, Any]]:
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return [{"type": "message_delta", "delta": delta, "usage": self._usage()}, {"type": "message_stop"}]

    async def whole(self) -> list[bytes]:
        blocks = [_whole_block(item) for item in self._items.kept]
        return [msgspec.json.encode(self._message(blocks, *self._stop()))]

    def _block(self, step: str, item: Item, text: str) -> list[dict[str, Any]]:
        index = len(self._items.all) - 1
        if step == "begin":
            return [{"type": "content_block_start", "index": index, "content_block": _empty_block(item)}]
        if step == "more":
            return [{"type": "content_block_delta", "index": index, "delta": _delta(item, text)}]
        stop = {"type": "content_block_stop", "index": index}
        if item.kind != "reasoning":
            return [stop]
        signature = {"type": "signature_delta", "signature": ""}
        return [{"type": "content_block_delta", "index": index, "delta": signature}, stop]

    def _stop(self) -> tuple[str, str | None]:
        done = self._items.done
        if done is None:
            return "end_turn", None
        if isinstance(done.stop_reason, str) and done.finish_reason == "stop":
            return "stop_sequence", done.stop_reason
        has_call = any(item.kind == "call" for item in self._items.kept) and done.finish_reason == "stop"
        return ("tool_use" if has_call else REASONS.get(done.finish_reason, "end_turn")), None

    def _usage(self) -> dict[str, Any]:
        cached = self._info.num_cached_tokens
        return {
            "input_tokens": self._num_prompt - cached, "output_tokens": self._items.num_tokens,
            "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0,
        }  # fmt: skip

    def _message(self, blocks: list[dict[str, Any]], reason: str | None, sequence: str | None) -> dict[str, Any]:
        return {
            "id": self._shape.id, "type": "message", "role": "assistant", "content": blocks,
            "model": self._shape.model, "stop_reason": reason, "stop_sequence": sequence, "usage": self._usage(),
        }  # fmt: skip


def _empty_block(item: Item) -> dict[str, Any]:
    if item.kind == "call":
        return {"type": "tool_use", "id": item.id, "name": item.name, "input": {}}
    if item.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _delta(item: Item, text: str) -> dict[str, Any]:
    if item.kind == "call":
        return {"type": "input_json_delta", "partial_json": text}
    return (
        {"type": "thinking_delta", "thinking": text}
        if item.kind == "reasoning"
        else {"type": "text_delta", "text": text}
    )


def _whole_block(item: Item) -> dict[str, Any]:
    block = _empty_block(item)
    if item.kind == "call":
        return {**block, "input": _input(item.text)}
    return {**block, "thinking" if item.kind == "reasoning" else "text": item.text}


def _input(text: str) -> Any:
    """Arguments that the answer's length has cut are none."""
    try:
        return json.loads(text)
    except ValueError:
        return {}
