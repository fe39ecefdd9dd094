"""Each trial in a process of its own, forked from one that has imported everything, with limits of time and memory."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from sweep_architectures.results import Result

Trial = Callable[[str, Path, int], Result]
"""(model type, an empty folder, level) -> result."""
FORK = multiprocessing.get_context("fork")
POLL_SECONDS = 0.5
IDLE = 8
"""So many times the limit of CPU time may pass: the machine may be busy with other things, or the process hangs."""


@dataclass(frozen=True)
class Limits:
    jobs: int
    """Processes side by side."""
    seconds: int
    """CPU time of one process."""
    memory: int
    """Bytes of address space of one process."""


@dataclass
class _Running:
    model_type: str
    process: multiprocessing.process.BaseProcess
    reader: Connection
    folder: Path
    started: float


def run_all(trial: Trial, types: Sequence[str], folder: Path, level: int, limits: Limits) -> Iterator[Result]:
    """Yields results as they come. A process that ends without one, or not in time, is a crash."""
    waiting, running = list(reversed(types)), []
    while waiting or running:
        while waiting and len(running) < limits.jobs:
            running.append(_start(trial, waiting.pop(), folder, level, limits))
        wait([one.reader for one in running], POLL_SECONDS)
        for one in list(running):
            result = _result(one, limits)
            if result is not None:
                running.remove(one)
                shutil.rmtree(one.folder, ignore_errors=True)
                yield replace(result, seconds=round(time.monotonic() - one.started, 1))


def _start(trial: Trial, model_type: str, folder: Path, level: int, limits: Limits) -> _Running:
    reader, writer = FORK.Pipe(duplex=False)
    own = folder / model_type
    own.mkdir()
    process = FORK.Process(target=_run, args=(writer, limits, trial, model_type, own, level))
    process.start()
    writer.close()
    return _Running(model_type, process, reader, own, time.monotonic())


def _run(writer: Connection, limits: Limits, trial: Trial, *arguments: object) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 1))
    writer.send(trial(*arguments))


def _result(one: _Running, limits: Limits) -> Result | None:
    """None while it runs."""
    if one.reader.poll():
        try:
            result = one.reader.recv()
            one.process.join()
            return result
        except EOFError:
            one.process.join()
            if one.process.exitcode == -signal.SIGXCPU:
                return Result(one.model_type, "crash", f"not done after {limits.seconds} s of CPU time")
            return Result(one.model_type, "crash", f"its process ended with status {one.process.exitcode}")
    if time.monotonic() - one.started <= IDLE * limits.seconds:
        return None
    one.process.kill()
    one.process.join()
    return Result(one.model_type, "crash", f"not done after {IDLE * limits.seconds} s")
