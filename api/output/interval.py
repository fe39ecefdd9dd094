"""Fewer, larger chunks: --stream-interval."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fuseline.api.output.events import Done, Event, TextDelta


async def in_intervals(events: AsyncIterator[Event], interval: int) -> AsyncIterator[Event]:
    """The events, a choice's text in deltas of `interval` tokens; its first token and its end wait for none."""
    held: dict[int, TextDelta] = {}
    started: set[int] = set()
    async for event in events:
        if isinstance(event, TextDelta):
            delta = _joined(held.pop(event.index, None), event)
            if event.index in started and len(delta.token_ids) < interval:
                held[event.index] = delta
                continue
            started.add(event.index)
            yield delta
            continue
        if isinstance(event, Done) and event.index in held:
            yield held.pop(event.index)
        yield event


def _joined(before: TextDelta | None, delta: TextDelta) -> TextDelta:
    if before is None:
        return delta
    return TextDelta(
        delta.index, before.text + delta.text, before.token_ids + delta.token_ids, before.logprobs + delta.logprobs
    )
