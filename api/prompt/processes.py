"""The worker processes of one pool: some are kept ready, and all are started in a thread.

A start waits for the fork server, which takes milliseconds, on a busy machine tenths of a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fuseline.api.prompt.worker_process import WorkerProcess

LOG = logging.getLogger("fuseline.prompts")


class Processes:
    """All methods belong to one event loop."""

    def __init__(self, new: Callable[[], WorkerProcess], num_ready: int, most_idle: int) -> None:
        """`new`: starts a process; called in a thread. `num_ready`: idle ones that are kept beside the busy ones."""
        self._new, self._num_ready, self._most_idle = new, num_ready, most_idle
        self.busy: set[WorkerProcess] = set()
        self.idle: list[WorkerProcess] = []
        self._starter = ThreadPoolExecutor(1, "fuseline-prompt-starter")
        self._starting: set[asyncio.Future[WorkerProcess]] = set()
        """Starts that no request waits for."""
        self._is_closed = False

    def close(self) -> None:
        """End the idle processes; busy ones end with their requests."""
        self._is_closed = True
        self._starter.shutdown(wait=False, cancel_futures=True)
        while self.idle:
            self.idle.pop().kill()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[WorkerProcess]:
        """A process for one request. One that has not come to the end of its reply is killed. Raises OSError."""
        process = await self._take()
        self.busy.add(process)
        self.keep_ready()
        try:
            yield process
        finally:
            self.busy.remove(process)
            self._give_back(process)
            self.keep_ready()

    def keep_ready(self) -> None:
        """Start one process, if too few are ready."""
        if len(self.idle) + len(self._starting) < self._num_ready and not self._is_closed:
            self._adopt_later(self._start())

    async def _take(self) -> WorkerProcess:
        while self.idle:
            process = self.idle.pop()
            if process.is_alive:
                return process
            process.kill()
        starting = self._start()
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._adopt_later(starting)
            raise

    def _start(self) -> asyncio.Future[WorkerProcess]:
        return asyncio.get_running_loop().run_in_executor(self._starter, self._new)

    def _adopt_later(self, starting: asyncio.Future[WorkerProcess]) -> None:
        self._starting.add(starting)
        starting.add_done_callback(self._adopt)

    def _adopt(self, started: asyncio.Future[WorkerProcess]) -> None:
        self._starting.discard(started)
        if started.cancelled():
            return
        if error := started.exception():  # the machine has no room for one; the next request tries again
            LOG.warning("no process to prepare requests can be started: %s", error)
        else:
            self._give_back(started.result())

    def _give_back(self, process: WorkerProcess) -> None:
        if process.is_free and not self._is_closed and len(self.idle) < self._most_idle:
            self.idle.append(process)
        else:
            process.kill()
