"""Long work on the event loop in slices, so that other requests go on in between."""

from __future__ import annotations

import asyncio
from collections import deque
from time import perf_counter

SLICE_SECONDS = 0.004


class Turns:
    """Lets one of those that wait go on in each round of the event loop, however many answers there are to encode."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            loop.call_soon(self._next, loop)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        turn = self._waiting.popleft()
        if not turn.done():  # else its answer has been cancelled
            turn.set_result(None)
        if self._waiting:
            loop.call_soon(self._next, loop)


class Pace:
    """Slices of one piece of work: `rest` gives way to others once a slice has passed."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._begin = perf_counter()

    async def rest(self) -> None:
        if perf_counter() - self._begin > SLICE_SECONDS:
            await self._turns.wait()
            self._begin = perf_counter()
