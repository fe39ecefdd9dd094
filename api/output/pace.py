"""Long work on the event loop in slices, so that other requests go on in between."""

from __future__ import annotations

import asyncio
import heapq
import sys
from collections import deque
from collections.abc import Callable
from itertools import count
from time import perf_counter

SLICE_SECONDS = 0.001
LARGE = sys.maxsize


class Turns:
    """The time that each round of the event loop has for work of some length, shared by all requests of a server.

    A round is all that is ready at once, between two looks at the sockets. Work asks before each piece of it; once a
    slice has passed in a round, it waits, and one of those that wait goes on in each round: the smallest and the oldest
    in turns, so that a small request does not wait for a crowd of larger ones.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._begin: float | None = None  # when somebody has asked first in this round
        self._by_age: deque[asyncio.Future[None]] = deque()
        self._by_size: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = count()
        self._takes_oldest = self._is_due = False

    @property
    def is_over(self) -> bool:
        """Whether this round has had its slice."""
        if self._begin is None:
            self._begin = self._clock()
            asyncio.get_running_loop().call_soon(self._end_round)
            return False
        return self._clock() - self._begin > SLICE_SECONDS

    async def rest(self, size: int = LARGE) -> None:
        """Wait for a turn if this round has had its slice. `size`: bytes of the request that the work is for."""
        if self.is_over:
            await self.wait(size)

    async def wait(self, size: int = LARGE) -> None:
        """Wait for a turn, which is in a later round."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._by_age.append(turn)
        heapq.heappush(self._by_size, (size, next(self._order), turn))
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self._next, loop)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        self._takes_oldest = not self._takes_oldest
        if (turn := self._first()) is not None:
            turn.set_result(None)
        self._is_due = bool(self._by_age)
        if self._is_due:
            loop.call_soon(self._next, loop)

    def _first(self) -> asyncio.Future[None] | None:
        """The next turn that has not been given by the other order and whose request has not been cancelled."""
        while self._by_age and self._by_size:
            turn = self._by_age.popleft() if self._takes_oldest else heapq.heappop(self._by_size)[-1]
            if not turn.done():
                return turn
        self._by_age.clear()
        self._by_size.clear()
        return None

    def _end_round(self) -> None:
        self._begin = None
