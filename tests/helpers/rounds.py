"""The work between two yields of an event loop, on a clock that only work moves: no other program can disturb it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class WorkClock:
    """Calling it tells the time, seconds of work."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


async def longest_round(clock: WorkClock, work: Coroutine[Any, Any, Any]) -> tuple[float, Any]:
    """The most work of a round of the event loop while `work` runs, and its result."""
    longest, last = 0.0, clock.now
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.sleep(0)
        longest, last = max(longest, clock.now - last), clock.now
    return longest, task.result()
