"""Long work on the event loop in slices, so that other requests go on in between."""

from __future__ import annotations

import asyncio
from time import perf_counter

SLICE_SECONDS = 0.004


class Pace:
    """Of one piece of work: `rest` gives way to others once a slice has passed."""

    def __init__(self) -> None:
        self._begin = perf_counter()

    async def rest(self) -> None:
        if perf_counter() - self._begin > SLICE_SECONDS:
            await asyncio.sleep(0)
            self._begin = perf_counter()
