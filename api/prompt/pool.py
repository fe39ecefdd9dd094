"""Worker processes that prepare requests: started when needed, ended when a request takes too long, started anew."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fuseline.api.errors import ApiError
from fuseline.api.prompt.worker_process import WorkerProcess

if TYPE_CHECKING:
    from fuseline.api.prompt.prepare import Kind, PromptSettings
    from fuseline.api.prompt.prepared import Reply

LOG = logging.getLogger("fuseline.prompts")


@dataclass(frozen=True)
class Lane:
    """Policy by which a pool shares its processes among requests of one size class."""

    niceness: int
    """Niceness of its processes: how far the engine goes first where both want the same core."""
    patience: float
    """Seconds after which a request is slow: it runs on, but others take its place."""
    slow_per_place: int
    """Slow requests that run on, for each place of the pool."""
    least: float
    """Seconds that a slow request may take at least, whoever waits."""
    num_ready: int
    """Processes that are kept ready beside the busy ones."""
    slow_niceness: int | None = None
    """Niceness of a process from then on; it takes no other request. None leaves it as it is."""
    memory_divisor: int = 1
    """Part of --prompt-memory that a process may take."""


SHORT = Lane(niceness=0, patience=0.05, slow_per_place=4, least=1.0, num_ready=2, slow_niceness=19, memory_divisor=8)
"""Bodies that take some milliseconds; one that takes longer has a template that runs on and on."""
LARGE = Lane(niceness=5, patience=2.0, slow_per_place=1, least=8.0, num_ready=1)


class PromptPool:
    """`size` places for requests, each with a process, and more processes for requests that turn out slow.

    A request that hangs delays others by `lane.patience` at most while there are fewer slow ones than the lane allows.
    Beyond that, one that has run for `lane.least` seconds is refused as soon as another request waits. The newest one
    waits least, so that a crowd of requests that hang does not stand in front of those that come later.
    All methods belong to one event loop but `start`.
    """

    def __init__(self, settings: PromptSettings, size: int, lane: Lane = SHORT) -> None:
        self._settings, self._size, self._lane = settings, size, lane
        self._memory = settings.config.prompt_memory // lane.memory_divisor
        self._timeout = settings.config.prompt_timeout
        self._num_free = size
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._slow: dict[_Job, None] = {}
        self._most_slow = size * lane.slow_per_place
        self._busy: set[WorkerProcess] = set()
        self._idle: list[WorkerProcess] = []
        self._is_closed = False

    def start(self) -> None:
        """Start a process before the first request."""
        self._idle.append(self._new_process())

    def close(self) -> None:
        """End the idle processes; busy ones end with their requests."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().kill()

    async def prepare(self, kind: Kind, pieces: Sequence[bytes]) -> Reply:
        """Raises ApiError 400 for a request that takes too long, 503 where no process is free in time or one ends."""
        await self._take_place()
        job = _Job(self)
        try:
            with self._process() as process:
                job.process = process
                await process.wait_ready()
                async with asyncio.timeout(self._timeout) as job.limit:
                    job.begin(self._lane)
                    return await process.prepare(kind, pieces)
        except TimeoutError as error:
            raise job.refusal(self._timeout, self._lane.least) from error
        except (EOFError, OSError) as error:
            LOG.error("a process that prepares requests ended while it worked on one (%s)", kind)
            message = "the process that read, rendered and encoded the request ended, maybe for --prompt-memory"
            raise ApiError(503, message, code="prompt_worker_ended") from error
        finally:
            job.end()

    # Places.

    async def _take_place(self) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._make_room()
        try:
            async with asyncio.timeout(self._timeout):
                await waiter
        except TimeoutError as error:
            if not waiter.cancelled():  # the place has come at the last moment
                return
            message = "too many requests are being read, rendered and encoded; try again later"
            raise ApiError(503, message, code="prompt_workers_busy", retry_after=5) from error
        except asyncio.CancelledError:
            if not waiter.cancelled():  # both at once: the place has come and its request has gone
                self.give_place()
            raise
        finally:
            with suppress(ValueError):
                self._waiting.remove(waiter)

    def give_place(self) -> None:
        """Hand a place to the newest request that waits."""
        while self._waiting:
            waiter = self._waiting.pop()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._num_free += 1

    def let_run_on(self, job: _Job) -> bool:
        """Whether a slow request may give its place to another one and still run on."""
        if len(self._slow) >= self._most_slow:
            self._make_room()
            return False
        self._slow[job] = None
        if self._lane.slow_niceness is not None:
            job.process.slow_down(self._lane.slow_niceness)
        self.give_place()
        return True

    def remove_slow(self, job: _Job) -> None:
        del self._slow[job]

    def _make_room(self) -> None:
        """Refuse the slow request that has run longest, if there are too many and it has had its time."""
        oldest = next(iter(self._slow), None)
        if self._waiting and oldest is not None and len(self._slow) >= self._most_slow:
            oldest.refuse_after(self._lane.least)

    # Processes.

    @contextmanager
    def _process(self) -> Iterator[WorkerProcess]:
        """A process for one request. One that has not come to the end of its reply is killed."""
        process = self._take()
        try:
            yield process
        finally:
            self._busy.remove(process)
            if process.is_free and not self._is_closed and len(self._idle) < self._size + self._lane.num_ready:
                self._idle.append(process)
            else:
                process.kill()
                self._keep_ready()

    def _take(self) -> WorkerProcess:
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                break
            process.kill()
        else:
            process = self._new_process()
        self._busy.add(process)
        self._keep_ready()
        return process

    def _new_process(self) -> WorkerProcess:
        return WorkerProcess(self._settings, self._lane.niceness, self._memory)

    def _keep_ready(self) -> None:
        """Start one process, if too few are ready."""
        if len(self._idle) < self._lane.num_ready and not self._is_closed:
            try:
                self.start()
            except OSError as error:  # the machine has no room for one; the next request tries again
                LOG.warning("no process to prepare requests can be started: %s", error)


class _Job:
    """One request in its process: it has a place until it is slow or has ended."""

    def __init__(self, pool: PromptPool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._begin = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._patience = 0.0
        self._has_place = True
        self._makes_room = False
        self.process: WorkerProcess
        self.limit: asyncio.Timeout

    def begin(self, lane: Lane) -> None:
        self._begin = self._loop.time()
        self._patience = lane.patience
        self._timer = self._loop.call_later(lane.patience, self._see_slow)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._has_place:
            self._pool.give_place()
        else:
            self._pool.remove_slow(self)

    def refuse_after(self, seconds: float) -> None:
        """Others wait: end the request when it has run for so long."""
        if self._makes_room or self.limit.expired():
            return
        self._makes_room = True
        self.limit.reschedule(min(self.limit.when(), max(self._begin + seconds, self._loop.time())))

    def refusal(self, timeout: float, least: float) -> ApiError:
        act = "reading, rendering and encoding the request takes more than"
        if self._makes_room and self._loop.time() - self._begin < timeout:
            message = f"{act} {least:g} seconds while other requests wait; try again later"
            return ApiError(503, message, code="prompt_workers_busy", retry_after=5)
        return ApiError(400, f"{act} {timeout:g} seconds (--prompt-timeout)", code="request_too_slow")

    def _see_slow(self) -> None:
        if self._pool.let_run_on(self):
            self._has_place = False
        else:
            self._timer = self._loop.call_later(self._patience, self._see_slow)
