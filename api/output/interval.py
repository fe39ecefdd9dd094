"""Fewer, larger chunks: --stream-interval."""

from __future__ import annotations

from fuseline.api.output.events import Done, Event, TextDelta


class Interval:
    """Joins a choice's text to deltas of `num_tokens` tokens; its first token and its end wait for none."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._held: dict[int, TextDelta] = {}
        self._started: set[int] = set()

    def feed(self, event: Event) -> tuple[Event, ...]:
        """Take an event; returns what is to be sent now."""
        if isinstance(event, TextDelta):
            event = _joined(self._held.pop(event.index, None), event)
            if event.index in self._started and len(event.token_ids) < self._num_tokens:
                self._held[event.index] = event
                return ()
            self._started.add(event.index)
        elif isinstance(event, Done) and event.index in self._held:
            return self._held.pop(event.index), event
        return (event,)


def _joined(before: TextDelta | None, delta: TextDelta) -> TextDelta:
    if before is None:
        return delta
    before.text += delta.text
    before.token_ids += delta.token_ids
    before.logprobs += delta.logprobs
    return before
