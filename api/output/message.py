"""The message of a chat's choice: what each event adds to it, and all of them together."""

from __future__ import annotations

from typing import Any

from fuseline.api.output.events import CallRevoked, Event, ReasoningDelta, TextDelta, ToolCallDelta


def delta_of(event: Event) -> dict[str, Any]:
    """`delta` of the chunk for an event (SPEC 7.2, 9.7, 10)."""
    if isinstance(event, TextDelta):
        return {"content": event.text}
    if isinstance(event, ReasoningDelta):
        return {"reasoning_content": event.text, "reasoning": event.text}
    call: dict[str, Any] = {"index": event.call, "function": {"arguments": event.arguments}}
    if event.name is not None:
        function = {"name": event.name, "arguments": event.arguments}
        call = {"index": event.call, "id": event.id, "type": "function", "function": function}
    return {"tool_calls": [call]}


def is_empty(event: Event) -> bool:
    """Whether an event adds nothing to the message."""
    if isinstance(event, ToolCallDelta):
        return not (event.arguments or event.name)
    return isinstance(event, CallRevoked) or not event.text


class Message:
    """Folds the events of one choice."""

    def __init__(self, begin: str = "") -> None:
        self._text = [begin]
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[str, str, list[str]]] = {}

    def take(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self._text.append(event.text)
        elif isinstance(event, ReasoningDelta):
            self._reasoning.append(event.text)
        elif isinstance(event, ToolCallDelta):
            if event.name is not None:
                self._calls[event.call] = (event.id or "", event.name, [])
            self._calls[event.call][2].append(event.arguments)
        elif isinstance(event, CallRevoked):
            del self._calls[event.call]

    def body(self, role: str, keeps_empty: bool = True) -> dict[str, Any]:
        """choices[].message (SPEC 9.4, 10). `keeps_empty`: content that is empty is "" and not null."""
        reasoning, text = "".join(self._reasoning), "".join(self._text)
        message: dict[str, Any] = {
            "role": role,
            "reasoning_content": reasoning or None,
            "content": text if text or keeps_empty else None,
            "refusal": None,
        }
        if reasoning:
            message["reasoning"] = reasoning
        if self._calls:
            message["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": name, "arguments": "".join(parts)}}
                for id, name, parts in self._calls.values()
            ]
        return message
