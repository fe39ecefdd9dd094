"""The events of one choice as a row of items: reasoning, text, calls, each with a beginning and an end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fuseline.api.output.events import (
    CallRevoked,
    Done,
    Event,
    Prompt,
    PromptInfo,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
)
from fuseline.api.output.openai_completion import Shape
from fuseline.engine.messages import PositionLogprobs

Step = Literal["begin", "more", "end"]


@dataclass
class Item:
    """One stretch of an answer."""

    kind: Literal["reasoning", "text", "call"]
    id: str = ""
    """Id of a call."""
    name: str = ""
    number: int = 0
    """Number of a call among the calls."""
    parts: list[str] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    is_revoked: bool = False

    @property
    def text(self) -> str:
        return "".join(self.parts)


class Items:
    """Tells where items begin and end."""

    def __init__(self) -> None:
        self.all: list[Item] = []
        self.done: Done | None = None
        self.num_tokens = 0
        self.logprobs: list[PositionLogprobs] = []
        """Of the tokens of the newest text, those that had none of their own before it among them."""
        self._early: list[PositionLogprobs] = []

    @property
    def kept(self) -> list[Item]:
        """Items of the whole answer."""
        return [item for item in self.all if not item.is_revoked]

    def take(self, event: Event) -> Iterator[tuple[Step, Item, str]]:
        """Yield the steps of an event: (step, item, its new text)."""
        if isinstance(event, Done):
            self.done = event
            yield from self._end()
            return
        if isinstance(event, CallRevoked):
            for item in self.all:
                item.is_revoked |= item.kind == "call" and item.number == event.call
            return
        self.num_tokens += len(event.token_ids)
        text = event.arguments if isinstance(event, ToolCallDelta) else event.text
        if not text:
            self._early += event.logprobs
            return
        self.logprobs, self._early = self._early + event.logprobs, []
        if not self._goes_on(event):
            yield from self._end()
            self.all.append(_new_item(event))
            yield "begin", self.all[-1], ""
        self.all[-1].parts.append(text)
        self.all[-1].logprobs += self.logprobs
        yield "more", self.all[-1], text

    def _goes_on(self, event: Event) -> bool:
        if not self.all:
            return False
        last = self.all[-1]
        if isinstance(event, ToolCallDelta):
            return last.kind == "call" and last.number == event.call
        return last.kind == ("reasoning" if isinstance(event, ReasoningDelta) else "text")

    def _end(self) -> Iterator[tuple[Step, Item, str]]:
        if self.all:
            yield "end", self.all[-1], ""


class ItemsWriter:
    """What the writers of one answer made of items share."""

    def __init__(self, shape: Shape, prompt: Prompt) -> None:
        self._shape, self._num_prompt = shape, len(prompt.ids)
        self._items = Items()
        self._info = PromptInfo()

    async def open(self, prompt: Prompt, info: PromptInfo) -> None:
        self._info = info

    def fold(self, prompt: Prompt, events: Sequence[Event]) -> None:
        for event in events:
            for _ in self._items.take(event):
                pass


def _new_item(event: TextDelta | ReasoningDelta | ToolCallDelta) -> Item:
    if isinstance(event, ToolCallDelta):
        return Item("call", event.id or "", event.name or "", event.call)
    return Item("reasoning" if isinstance(event, ReasoningDelta) else "text")
