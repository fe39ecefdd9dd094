"""Who gets a place among requests that hang, on a clock of its own, and processes that take long to start."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import virtual_time
from prompt_cases import settings

from fuseline.api.errors import ApiError
from fuseline.api.prompt.pool import LARGE, SHORT, Lane, PromptPool
from fuseline.api.prompt.processes import Processes

PLACES, TIMEOUT = 2, 30.0
SETTINGS = settings(prompt_timeout=TIMEOUT)


class FakeProcess:
    """Takes as many seconds for a request as its body says."""

    def __init__(self, slowness: float) -> None:
        self.is_slowed, self.slowness = False, slowness

    async def wait_ready(self) -> None:
        pass

    async def prepare(self, kind: str, pieces: list[bytes]) -> str:
        await asyncio.sleep(float(pieces[0]) * self.slowness)
        return "done"

    def cpu_seconds(self) -> float:
        return asyncio.get_running_loop().time() / self.slowness

    def slow_down(self, niceness: int) -> None:
        self.is_slowed = True


class FakeProcesses:
    """Any number of processes at once; counts those that run."""

    def __init__(self, slowness: float = 1.0) -> None:
        self.slowness = slowness
        self.processes: list[FakeProcess] = []
        self.num_busy = self.most_busy = 0

    @asynccontextmanager
    async def one(self) -> AsyncIterator[FakeProcess]:
        self.num_busy += 1
        self.most_busy = max(self.most_busy, self.num_busy)
        try:
            self.processes.append(FakeProcess(self.slowness))
            yield self.processes[-1]
        finally:
            self.num_busy -= 1


def make_pool(lane: Lane, slowness: float = 1.0) -> tuple[PromptPool, FakeProcesses]:
    """`slowness`: how many times as long everything takes, as other programs use the processors."""
    pool = PromptPool(SETTINGS, PLACES, lane)
    pool.processes = processes = FakeProcesses(slowness)
    return pool, processes


def check_free(pool: PromptPool, lane: Lane) -> None:
    assert pool._num_free == PLACES and pool._num_slow_free == PLACES * lane.slow_per_place
    assert not (pool._waiting or pool._parked or pool._slow or pool._overdue or pool.processes.num_busy)


@pytest.mark.parametrize("lane", [SHORT, LARGE], ids=["short", "large"])
@pytest.mark.parametrize("num_hung", [2, 7, 60, 500])
def test_others_wait_for_the_patience_of_one_request(lane: Lane, num_hung: int) -> None:
    """However many requests hang, and however long: the next one has a place within the lane's patience."""

    async def crowd() -> None:
        pool, processes = make_pool(lane)
        loop = asyncio.get_running_loop()
        hung = [asyncio.create_task(pool.prepare("chat", [b"1e9"])) for _ in range(num_hung)]
        waits = []
        for _ in range(200):
            await asyncio.sleep(lane.patience / 7)
            begin = loop.time()
            assert await pool.prepare("chat", [b"0.001"]) == "done"
            waits.append(loop.time() - begin - 0.001)
        assert max(waits) <= lane.patience + 1e-6, max(waits)
        assert processes.most_busy <= PLACES * (1 + lane.slow_per_place)
        errors = await asyncio.gather(*hung, return_exceptions=True)
        assert {error.code for error in errors} <= {"prompt_workers_busy", "request_too_slow"}
        assert loop.time() < 3 * TIMEOUT, "none waits for ever"
        check_free(pool, lane)

    virtual_time.run(crowd())


def test_a_slow_request_among_those_that_hang_is_answered() -> None:
    """It loses its place, starts anew beside the others, and has `least` seconds then."""

    async def crowd() -> None:
        pool, _ = make_pool(SHORT)
        hung = [asyncio.create_task(pool.prepare("chat", [b"1e9"])) for _ in range(20)]
        await asyncio.sleep(0.5)
        slow = [asyncio.create_task(pool.prepare("chat", [b"0.8"])) for _ in range(3)]
        others = [asyncio.create_task(pool.prepare("chat", [b"0.01"])) for _ in range(9)]
        assert await asyncio.gather(*slow, *others) == ["done"] * 12
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)
        check_free(pool, SHORT)

    virtual_time.run(crowd())


def test_a_quick_request_on_a_busy_machine_is_no_slow_one() -> None:
    """Else it would lose its place or its priority, and wait behind those that hang."""

    async def crowd() -> None:
        pool, processes = make_pool(SHORT, slowness=8)
        hung = [asyncio.create_task(pool.prepare("chat", [b"1e9"])) for _ in range(60)]
        await asyncio.sleep(5)
        waits, num_before = [], len(processes.processes)
        for _ in range(50):
            begin = asyncio.get_running_loop().time()
            assert await pool.prepare("chat", [b"0.03"]) == "done"
            waits.append(asyncio.get_running_loop().time() - begin)
        assert max(waits) <= 8 * (SHORT.patience + 0.03) + SHORT.patience, max(waits)
        quick = processes.processes[num_before:]
        assert sum(process.is_slowed for process in quick) <= len(quick) - 50
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)
        check_free(pool, SHORT)

    virtual_time.run(crowd())


def test_slow_requests_alone_run_to_their_end() -> None:
    async def few() -> None:
        pool, processes = make_pool(SHORT)
        jobs = [pool.prepare("chat", [b"20"]) for _ in range(PLACES * (1 + SHORT.slow_per_place))]
        assert set(await asyncio.gather(*jobs)) == {"done"}
        assert asyncio.get_running_loop().time() < 21 and processes.most_busy == len(jobs)
        check_free(pool, SHORT)

    virtual_time.run(few())


@pytest.mark.parametrize("when", [0.01, 0.2, 0.7, 1.5])
def test_clients_that_leave_leave_nothing_behind(when: float) -> None:
    async def leave() -> None:
        pool, _ = make_pool(SHORT)
        jobs = [asyncio.create_task(pool.prepare("chat", [b"1e9"])) for _ in range(40)]
        await asyncio.sleep(when)
        for job in jobs[::2]:
            job.cancel()
        await asyncio.sleep(0.05)
        assert await pool.prepare("chat", [b"0"]) == "done"
        for job in jobs:
            job.cancel()
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError | ApiError) for result in results)
        check_free(pool, SHORT)

    virtual_time.run(leave())


class StartedProcess:
    is_alive = is_free = True

    def __init__(self) -> None:
        self.is_killed = False

    def kill(self) -> None:
        self.is_killed = True


async def test_the_event_loop_goes_on_while_a_process_starts() -> None:
    """A start that waits for the event loop would never end on it."""
    goes_on, made = threading.Event(), []

    def start() -> StartedProcess:
        assert goes_on.wait(60), "the event loop does not go on"
        made.append(StartedProcess())
        return made[-1]

    processes = Processes(start, num_ready=1, most_idle=2)

    async def use() -> StartedProcess:
        async with processes.one() as process:
            return process

    using, leaving = asyncio.create_task(use()), asyncio.create_task(use())
    await asyncio.sleep(0)
    leaving.cancel()
    asyncio.get_running_loop().call_soon(goes_on.set)
    await using
    while len(processes.idle) < 2:
        await asyncio.sleep(0.001)
    kept = list(processes.idle)
    processes.close()
    assert all(process.is_killed for process in kept) and not processes.idle, "what nobody took is kept, then ended"


async def test_a_process_that_cannot_start_fails_its_request_alone() -> None:
    def start() -> StartedProcess:
        raise OSError("no room")

    pool = PromptPool(SETTINGS, PLACES, SHORT)
    pool.processes = Processes(start, num_ready=0, most_idle=2)
    for _ in range(5):
        with pytest.raises(ApiError) as failed:
            await pool.prepare("chat", [b"{}"])
        assert failed.value.status == 503
    assert pool._num_free == PLACES
    pool.close()
