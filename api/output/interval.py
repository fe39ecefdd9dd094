"""Fewer, larger chunks: --stream-interval."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from fuseline.api.output.events import Done, Event, TextDelta


class Interval:
    """Joins a choice's text to deltas of `num_tokens` tokens; its first token and its end wait for none."""

    def __init__(self, num_tokens: int, sink: Callable[[Sequence[Event]], Awaitable[None] | None]) -> None:
        self._num_tokens, self._sink = num_tokens, sink
        self._held: dict[int, TextDelta] = {}
        self._started: set[int] = set()

    def feed(self, events: Sequence[Event]) -> Awaitable[None] | None:
        """Hand on what is to be sent now of the events of one output."""
        ends = {event.index for event in events if isinstance(event, Done)}
        ready: list[Event] = []
        for event in events:
            if isinstance(event, TextDelta):
                event = _joined(self._held.pop(event.index, None), event)
                is_short = event.index in self._started and len(event.token_ids) < self._num_tokens
                if is_short and event.index not in ends:
                    self._held[event.index] = event
                    continue
                self._started.add(event.index)
            ready.append(event)
        return self._sink(ready) if ready else None


def _joined(before: TextDelta | None, delta: TextDelta) -> TextDelta:
    if before is None:
        return delta
    before.text += delta.text
    before.token_ids += delta.token_ids
    before.logprobs += delta.logprobs
    before.offsets += delta.offsets
    return before
