"""In which order the stages of steps follow: one step after the other, or the next prepared while one runs."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from fuseline.engine.run.runner import Batch, StepResult


class Stages(Protocol):
    """What a step consists of, in order. All but `compute` belong to the engine's thread."""

    def prepare(self) -> Batch | None:
        """Schedule a step and build its inputs, token ids excepted. None when there is nothing to compute."""

    def launch(self, batch: Batch) -> None:
        """All tokens before it are known: fill them in, and count the step as computed."""

    def compute(self, batch: Batch) -> StepResult: ...

    def store(self, batch: Batch, result: StepResult) -> None:
        """Append the new tokens to their sequences."""

    def report(self, batch: Batch, result: StepResult) -> None:
        """Find endings and make outputs."""


class InOrder:
    """A step is scheduled when the last one has been reported."""

    is_running = False

    def step(self, stages: Stages) -> None:
        batch = stages.prepare()
        if batch is not None:
            stages.launch(batch)
            result = stages.compute(batch)
            stages.store(batch, result)
            stages.report(batch, result)

    def drain(self, stages: Stages) -> None:
        """Nothing runs between two steps."""


class Overlapped:
    """The next step is prepared, and the last one reported, while one runs in a thread of its own.

    The host is one step behind: a sequence that ends by a token is still in the next step, whose token for it is
    dropped.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "fuseline-model")
        self._running: tuple[Batch, Future[StepResult]] | None = None

    @property
    def is_running(self) -> bool:
        return self._running is not None

    def step(self, stages: Stages) -> None:
        batch = stages.prepare()
        last = self._finish(stages)
        if batch is not None:
            stages.launch(batch)
            self._start(stages, batch)
        if last is not None:
            stages.report(*last)

    def drain(self, stages: Stages) -> None:
        """Wait for what runs, and report it."""
        last = self._finish(stages)
        if last is not None:
            stages.report(*last)

    def _finish(self, stages: Stages) -> tuple[Batch, StepResult] | None:
        if self._running is None:
            return None
        (batch, future), self._running = self._running, None
        result = future.result()
        stages.store(batch, result)
        return batch, result

    def _start(self, stages: Stages, batch: Batch) -> None:
        is_on_its_way = threading.Event()

        def compute() -> StepResult:
            is_on_its_way.set()
            return stages.compute(batch)

        self._running = batch, self._worker.submit(compute)
        # The interpreter belongs to the worker until the model gives it back: reporting first would hold the model up.
        is_on_its_way.wait()
