"""Events on their way to one client: whatever has gathered since the last write goes with the next."""

from __future__ import annotations

import asyncio
from collections import deque

KEEP_ALIVE = b": keep-alive\n\n"
WRITE_BYTES = 262144
"""Most bytes that one write hands to a connection, if they are several events."""


class Outbox:
    """One side adds, the other takes. Silence of `seconds` (0: any) yields a comment line."""

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[bytes] = deque()  # or pieces of events
        self._waiter: asyncio.Future[None] | None = None
        self._is_closed = False
        self._error: Exception | None = None
        self.has_begun = False
        """Something has been added."""
        self._seconds = seconds
        self._last_write = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._check_silence) if seconds > 0 else None

    def add(self, *pieces: bytes) -> None:
        """An event, in one piece or several."""
        self.has_begun = True
        self._events += pieces
        self._wake()

    def close(self) -> None:
        """Nothing more will be added."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._wake()

    def fail(self, error: Exception) -> None:
        """Nothing has been added and nothing will be, because of `error`, which take() raises."""
        self._error = error
        self.close()

    async def take(self) -> bytes:
        """Take the events added so far, WRITE_BYTES at most; waits for one. Empty once closed and taken."""
        while not self._events and not self._is_closed:
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        self._last_write = self._loop.time()
        taken, size = [], 0
        while self._events and (not taken or size + len(self._events[0]) <= WRITE_BYTES):
            taken.append(self._events.popleft())
            size += len(taken[-1])
        return b"".join(taken)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check_silence(self) -> None:
        """One timer for the whole answer rather than one for each write."""
        left = self._last_write + self._seconds - self._loop.time()
        if left <= 0 and self.has_begun and self._waiter is not None and not self._waiter.done():
            self.add(KEEP_ALIVE)
        self._timer = self._loop.call_later(left if left > 0 else self._seconds, self._check_silence)
