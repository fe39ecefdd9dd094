"""An event loop whose clock jumps to the next timer: hours pass at once, and no other program can disturb them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._now = max(self._now, min(timer.when() for timer in self._scheduled if not timer.cancelled()))
        super()._run_once()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which may use timers and nothing else that waits."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()
