"""best_of: more choices are generated than shown, and the likeliest are kept (SPEC 6.10)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from fuseline.api.output.events import Done, Event, TextDelta


class BestOf:
    """Holds all choices until the last has ended, then hands on the best `num_shown`, numbered anew, best first."""

    def __init__(
        self, num_shown: int, num_generated: int, sink: Callable[[Sequence[Event]], Awaitable[None] | None]
    ) -> None:
        self._num_shown, self._sink = num_shown, sink
        self._choices: list[list[Event]] = [[] for _ in range(num_generated)]
        self._num_open = num_generated

    def feed(self, events: Sequence[Event]) -> Awaitable[None] | None:
        """Take the events of one output. Texts come with log-probabilities."""
        for event in events:
            self._choices[event.index].append(event)
            self._num_open -= isinstance(event, Done)
        return None if self._num_open else self._show()

    async def _show(self) -> None:
        best = sorted(self._choices, key=_logprob, reverse=True)  # stable: the earlier choice of two equal ones
        for place, choice in enumerate(best[: self._num_shown]):
            if (work := self._sink([replace(event, index=place) for event in choice])) is not None:
                await work


def _logprob(choice: list[Event]) -> float:
    """Cumulative log-probability of a choice's tokens."""
    deltas = (event for event in choice if isinstance(event, TextDelta))
    return sum(position.logprob for delta in deltas for position in delta.logprobs)
