"""In which order the stages of steps follow: one step after the other, or the next prepared while one runs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from fuseline.engine.run.runner import Batch
from fuseline.engine.run.sampling import Launched, StepResult


class Stages(Protocol):
    """What a step consists of, in order. All but `compute` belong to the engine's thread."""

    def prepare(self) -> Batch | None:
        """Schedule a step and build its inputs, token ids excepted. None when there is nothing to compute."""

    def launch(self, batch: Batch) -> None:
        """Fill in the tokens before it that are known, and count the step as computed."""

    def commit(self, batch: Batch) -> None:
        """All tokens before it are known: later steps find the blocks that it fills."""

    def compute(self, batch: Batch) -> Launched:
        """Model and sampling."""

    def store(self, batch: Batch, result: StepResult) -> None:
        """Append the new tokens to their sequences."""

    def report(self, batch: Batch, result: StepResult) -> None:
        """Find endings and make outputs."""


class Running(Protocol):
    """A step that was started; a Future is one, and what a device has yet to do."""

    def result(self) -> StepResult: ...


class Order(Protocol):
    is_running: bool

    def step(self, stages: Stages) -> None:
        """One turn of the loop."""

    def drain(self, stages: Stages) -> None:
        """Wait for what runs, and report it."""


def order_of_stages(is_queue: bool, is_async: bool) -> Order:
    """`is_queue`: the device's work is only launched, so the host is ahead of it anyway."""
    if is_queue:
        return Queued()
    return Overlapped() if is_async else InOrder()


class InOrder:
    """A step is scheduled when the last one has been reported."""

    is_running = False

    def step(self, stages: Stages) -> None:
        batch = stages.prepare()
        if batch is not None:
            stages.launch(batch)
            stages.commit(batch)
            result = stages.compute(batch).result()
            stages.store(batch, result)
            stages.report(batch, result)

    def drain(self, stages: Stages) -> None:
        """Nothing runs between two steps."""


class _Behind:
    """The host reports a step when the next one runs: a sequence that ends by a token is still in that one, whose token
    for it is dropped."""

    def __init__(self) -> None:
        self._running: tuple[Batch, Running] | None = None

    @property
    def is_running(self) -> bool:
        return self._running is not None

    def drain(self, stages: Stages) -> None:
        last = self._finish(stages)
        if last is not None:
            stages.report(*last)

    def _finish(self, stages: Stages) -> tuple[Batch, StepResult] | None:
        if self._running is None:
            return None
        (batch, running), self._running = self._running, None
        result = running.result()
        stages.store(batch, result)
        return batch, result


class Overlapped(_Behind):
    """The next step is prepared, and the last one reported, while one runs in a thread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._worker = ThreadPoolExecutor(1, "fuseline-model")

    def step(self, stages: Stages) -> None:
        batch = stages.prepare()
        last = self._finish(stages)
        if batch is not None:
            stages.launch(batch)
            stages.commit(batch)
            self._running = batch, self._start(stages, batch)
        if last is not None:
            stages.report(*last)

    def _start(self, stages: Stages, batch: Batch) -> Running:
        is_on_its_way = threading.Event()

        def compute() -> StepResult:
            is_on_its_way.set()
            return stages.compute(batch).result()

        future = self._worker.submit(compute)
        # The interpreter belongs to the worker until the model gives it back: reporting first would hold the model up.
        is_on_its_way.wait()
        return future


class Queued(_Behind):
    """The next step is launched behind the one that runs and takes its tokens on the device; the host waits for those
    of a step only when the next one is on its way. A batch that needs them sooner is launched once they are there."""

    def step(self, stages: Stages) -> None:
        batch = stages.prepare()
        if batch is None or batch.reads_tokens:
            last = self._finish(stages)
            started = self._launch(stages, batch)
        else:
            started = self._launch(stages, batch)
            last = self._finish(stages)
        self._running = started
        if batch is not None:
            stages.commit(batch)
        if last is not None:
            stages.report(*last)

    def _launch(self, stages: Stages, batch: Batch | None) -> tuple[Batch, Running] | None:
        if batch is None:
            return None
        stages.launch(batch)
        return batch, stages.compute(batch)
