"""Worker processes that prepare requests: started when needed, ended when a request takes too long, started anew."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fuseline.api.errors import ApiError
from fuseline.api.prompt.processes import Processes
from fuseline.api.prompt.worker_process import WorkerProcess

if TYPE_CHECKING:
    from fuseline.api.prompt.prepare import Kind, PromptSettings
    from fuseline.api.prompt.prepared import Reply

LOG = logging.getLogger("fuseline.prompts")
BUSY = 10
"""How many times as long as its processor time a request may take, on a busy machine, before it counts as slow."""


@dataclass(frozen=True)
class Lane:
    """Policy by which a pool shares its processes among requests of one size class."""

    niceness: int
    """Niceness of its processes: how far the engine goes first where both want the same core."""
    patience: float
    """Seconds of processor time after which a request is slow: others take its place, and it runs on beside them or
    starts anew later. Ten times as long if the processor does other things."""
    slow_per_place: int
    """Slow requests that run on, for each place of the pool."""
    least: float
    """Seconds that a slow request may take at least, whoever waits to run beside the others like it."""
    num_ready: int
    """Processes that are kept ready beside the busy ones."""
    slow_niceness: int | None = None
    """Niceness of a process from then on; it takes no other request. None leaves it as it is."""
    memory_divisor: int = 1
    """Part of --prompt-memory that a process may take."""


SHORT = Lane(niceness=5, patience=0.035, slow_per_place=4, least=1.0, num_ready=2, slow_niceness=19, memory_divisor=8)
"""Bodies that take some milliseconds; one that takes longer has a template that runs on and on. The engine goes first:
a burst of them wants every core."""
LARGE = Lane(niceness=5, patience=2.0, slow_per_place=1, least=8.0, num_ready=1)


class PromptPool:
    """`size` places for requests, each with a process, and more processes for requests that turn out slow.

    A slow request leaves its place to the next one. It runs on while there are fewer slow ones than the lane allows;
    else it is ended as soon as another request wants its place, and starts anew when a slow one has ended, of which
    the oldest is refused after `lane.least` seconds. So requests that hang delay others by `lane.patience` at most,
    however many there are. The newest one waits least: a crowd does not stand in front of those that come later.
    All methods belong to one event loop.
    """

    def __init__(self, settings: PromptSettings, size: int, lane: Lane = SHORT) -> None:
        self._lane = lane
        self._timeout = settings.config.prompt_timeout
        memory = settings.config.prompt_memory // lane.memory_divisor
        start = partial(WorkerProcess, settings, lane.niceness, memory)
        self.processes = Processes(start, lane.num_ready, size + lane.num_ready)
        self._num_free = size
        self._waiting: deque[asyncio.Future[None]] = deque()
        """For a place."""
        self._overdue: dict[_Job, None] = {}
        """Slow requests that keep their places while nobody wants them."""
        self._num_slow_free = size * lane.slow_per_place
        self._parked: deque[asyncio.Future[None]] = deque()
        """Slow requests that wait to start anew."""
        self._slow: dict[_Job, None] = {}
        """Slow requests that run, beside those with a place."""

    def start(self) -> None:
        """Start a process before the first request."""
        self.processes.keep_ready()

    def close(self) -> None:
        """End the idle processes; busy ones end with their requests."""
        self.processes.close()

    async def prepare(self, kind: Kind, pieces: Sequence[bytes]) -> Reply:
        """Raises ApiError 400 for a request that takes too long, 503 where no process is free in time or one ends."""
        await self._take_place()
        try:
            return await self._run(_Job(self, has_place=True), kind, pieces)
        except _GaveWayError:
            pass
        if self._num_slow_free:
            self._num_slow_free -= 1
        else:
            await self._wait(self._parked, self._give_slow_place)
        return await self._run(_Job(self, has_place=False), kind, pieces)

    async def _run(self, job: _Job, kind: Kind, pieces: Sequence[bytes]) -> Reply:
        try:
            async with self.processes.one() as process:
                await process.wait_ready()
                async with asyncio.timeout(self._timeout) as limit:
                    job.begin(process, limit, self._lane)
                    return await process.prepare(kind, pieces)
        except TimeoutError as error:
            raise job.refusal(self._timeout, self._lane.least) from error
        except (EOFError, OSError) as error:
            LOG.error("a process that prepares requests ended while it worked on one (%s)", kind)
            message = "the process that read, rendered and encoded the request ended, maybe for --prompt-memory"
            raise ApiError(503, message, code="prompt_worker_ended") from error
        finally:
            self._leave(job)

    async def _take_place(self) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        if self._overdue:
            job = next(iter(self._overdue))
            del self._overdue[job]
            job.give_way()
        await self._wait(self._waiting, self.give_place)

    async def _wait(self, queue: deque[asyncio.Future[None]], hand_on: Callable[[], None]) -> None:
        """`hand_on` gives to another request what has come for one that is gone."""
        waiter = asyncio.get_running_loop().create_future()
        queue.append(waiter)
        self._make_room()
        try:
            async with asyncio.timeout(self._timeout):
                await waiter
        except TimeoutError as error:
            if not waiter.cancelled():  # it has come at the last moment
                return
            message = "too many requests are being read, rendered and encoded; try again later"
            raise ApiError(503, message, code="prompt_workers_busy", retry_after=5) from error
        except asyncio.CancelledError:
            if not waiter.cancelled():  # both at once: it has come and its request has gone
                hand_on()
            raise
        finally:
            with suppress(ValueError):
                queue.remove(waiter)

    def give_place(self) -> None:
        """Hand a place to the newest request that waits."""
        while self._waiting:
            waiter = self._waiting.pop()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._num_free += 1

    def see_slow(self, job: _Job) -> None:
        """A request has lost its patience: it leaves its place, at once or as soon as somebody wants it."""
        if self._num_slow_free:
            self._num_slow_free -= 1
            self.run_on(job)
            self.give_place()
        elif self._waiting:
            job.give_way()
        else:
            self._overdue[job] = None

    def run_on(self, job: _Job) -> None:
        """The request is one of the slow ones from now on."""
        job.leave_place(self._lane.slow_niceness)
        self._slow[job] = None
        self._make_room()

    def _leave(self, job: _Job) -> None:
        job.end()
        self._overdue.pop(job, None)
        if job.has_place:
            self.give_place()
        else:
            self._slow.pop(job, None)
            self._give_slow_place()

    def _give_slow_place(self) -> None:
        """Let the slow request that has waited longest start anew."""
        while self._parked:
            waiter = self._parked.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._num_slow_free += 1

    def _make_room(self) -> None:
        """Refuse the slow request that has run longest, once it has had its time, if another one wants to start."""
        oldest = next(iter(self._slow), None)
        if self._parked and oldest is not None:
            oldest.refuse_after(self._lane.least)


class _GaveWayError(Exception):
    """A slow request has been ended for another one that wanted its place."""


class _Job:
    """One run of a request in a process: in a place until it is slow, or beside all places from the beginning."""

    def __init__(self, pool: PromptPool, has_place: bool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._begin = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._gives_way = self._makes_room = False
        self._used = 0.0  # processor time of its process before it
        self._process: WorkerProcess
        self._limit: asyncio.Timeout
        self.has_place = has_place

    def begin(self, process: WorkerProcess, limit: asyncio.Timeout, lane: Lane) -> None:
        self._process, self._limit, self._begin = process, limit, self._loop.time()
        if self.has_place:
            self._used = process.cpu_seconds()
            self._timer = self._loop.call_later(lane.patience, self._see_slow, lane.patience)
        else:
            self._pool.run_on(self)

    def _see_slow(self, patience: float) -> None:
        """On a busy machine a request that needs some milliseconds may take long: that does not make it a slow one."""
        left = patience - (self._process.cpu_seconds() - self._used)
        if left > 0 and self._loop.time() - self._begin < BUSY * patience:
            self._timer = self._loop.call_later(max(left, patience / 10), self._see_slow, patience)
        else:
            self._pool.see_slow(self)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def leave_place(self, niceness: int | None) -> None:
        self.has_place = False
        if niceness is not None:
            self._process.slow_down(niceness)

    def give_way(self) -> None:
        """End this run; the request starts anew later."""
        self._gives_way = True
        self._end_after(0)

    def refuse_after(self, seconds: float) -> None:
        """Others wait: end the request when it has run for so long."""
        if not self._makes_room:
            self._makes_room = True
            self._end_after(seconds)

    def refusal(self, timeout: float, least: float) -> Exception:
        """The reason for which the run has been ended."""
        if self._gives_way:
            return _GaveWayError()
        act = "reading, rendering and encoding the request takes more than"
        if self._makes_room and self._loop.time() - self._begin < timeout:
            message = f"{act} {least:g} seconds while other requests wait; try again later"
            return ApiError(503, message, code="prompt_workers_busy", retry_after=5)
        return ApiError(400, f"{act} {timeout:g} seconds (--prompt-timeout)", code="request_too_slow")

    def _end_after(self, seconds: float) -> None:
        if not self._limit.expired():
            self._limit.reschedule(min(self._limit.when(), max(self._begin + seconds, self._loop.time())))
