"""Long work on the event loop in slices, so that other requests go on in between."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter

SLICE_SECONDS = 0.004


class Turns:
    """The time that each round of the event loop has for work of some length, shared by all requests of a server.

    A round is all that is ready at once, between two looks at the sockets. Work asks before each piece of it; once a
    slice has passed in a round, it waits, and one of those that wait goes on in each round.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._begin: float | None = None  # when somebody has asked first in this round
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def is_over(self) -> bool:
        """Whether this round has had its slice."""
        if self._begin is None:
            self._begin = self._clock()
            asyncio.get_running_loop().call_soon(self._end_round)
            return False
        return self._clock() - self._begin > SLICE_SECONDS

    async def rest(self) -> None:
        """Wait for a turn if this round has had its slice."""
        if self.is_over:
            await self.wait()

    async def wait(self) -> None:
        """Wait for a turn, which is in a later round."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            loop.call_soon(self._next, loop)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        turn = self._waiting.popleft()
        if not turn.done():  # else its request has been cancelled
            turn.set_result(None)
        if self._waiting:
            loop.call_soon(self._next, loop)

    def _end_round(self) -> None:
        self._begin = None
