"""Bounds on the request bodies that the server holds: of each one, and of all together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fuseline.api.errors import ApiError

TOTAL = 8
"""Largest bodies that may be held at the same time."""


class Held:
    """One body as it comes in."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises ApiError 413 or 429."""
        self.num_bytes += num_bytes
        self._bodies.num_bytes += num_bytes
        self._bodies.check(self.num_bytes)


class Bodies:
    """Counts the bytes of all bodies that are held. `max_bytes`: the bound of one body."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    def check(self, num_bytes: int) -> None:
        """Raises ApiError 413 for a body of so many bytes, 429 when too much is held already."""
        if num_bytes > self._max_bytes:
            raise ApiError(413, f"the body is larger than {self._max_bytes} bytes (--max-request-bytes)")
        if self.num_bytes > TOTAL * self._max_bytes:
            message = "too many large requests are being read; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=1)

    @contextmanager
    def hold(self) -> Iterator[Held]:
        """Counts a body until it has been prepared."""
        held = Held(self)
        try:
            yield held
        finally:
            self.num_bytes -= held.num_bytes
