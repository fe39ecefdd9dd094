"""In which order the stages of steps follow: one step after the other, or the next prepared while one runs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from fuseline.engine.state.scheduled_batch import ScheduledBatch


class Prepared(Protocol):
    """A batch made ready for the device."""

    reads_tokens: bool
    """The host must know the tokens of the step before to launch this one."""


BatchT = TypeVar("BatchT", bound=Prepared)
ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)


class Running(Protocol[ResultT_co]):
    """A step that was started: a Future, or work that an asynchronous device has yet to do."""

    def result(self) -> ResultT_co:
        """Waits for the step."""


class Stages(Protocol[BatchT, ResultT]):
    """The stages of a step. All but `compute` belong to the engine's thread."""

    def waits_for_tokens(self) -> bool:
        """Whether the next step is scheduled when the one that runs has been reported, in any order of stages."""

    def schedule(self) -> ScheduledBatch:
        """Decide what the step computes; nothing when its `num_tokens` is 0."""

    def prepare(self, scheduled: ScheduledBatch) -> BatchT:
        """Build the inputs of the step, token ids excepted."""

    def launch(self, batch: BatchT) -> None:
        """Fill in the tokens before it that are known, and count the step as computed."""

    def compute(self, batch: BatchT) -> Running[ResultT]:
        """Run the model and sample or pool."""

    def commit(self, batch: BatchT) -> None:
        """All tokens before it are known: later steps find the blocks that it fills."""

    def store(self, batch: BatchT, result: ResultT) -> None:
        """Verify drafts, and append the new tokens to their sequences."""

    def report(self, batch: BatchT, result: ResultT) -> None:
        """Find endings and make outputs."""


class StageOrder(Protocol):
    is_running: bool
    is_computing: bool
    """Whether a thread of the host computes a step, so that this one has nothing to do."""

    def step(self, stages: Stages) -> None:
        """One turn of the loop."""

    def drain(self, stages: Stages) -> None:
        """Wait for the step that runs, and report it."""


def choose_stage_order(is_asynchronous: bool, is_overlapped: bool) -> StageOrder:
    """`is_asynchronous`: work for the device is only launched, so the host is ahead of it anyway. `is_overlapped`: the
    host prepares the next step while a thread computes one.
    """
    if is_asynchronous:
        return LaunchedAhead()
    return Overlapped() if is_overlapped else InOrder()


def _prepare_next(stages: Stages[BatchT, ResultT]) -> BatchT | None:
    scheduled = stages.schedule()
    return stages.prepare(scheduled) if scheduled.num_tokens else None


class InOrder:
    """A step is scheduled when the last one has been reported."""

    is_running = is_computing = False

    def step(self, stages: Stages) -> None:
        batch = _prepare_next(stages)
        if batch is not None:
            stages.launch(batch)
            running = stages.compute(batch)
            stages.commit(batch)
            result = running.result()
            stages.store(batch, result)
            stages.report(batch, result)

    def drain(self, stages: Stages) -> None:
        """Nothing runs between two steps."""


class _Behind(Generic[BatchT, ResultT]):
    """The host reports a step when the next one runs: a sequence that ends by a token is still in that one, whose token
    for it is dropped.
    """

    def __init__(self) -> None:
        self._running: tuple[BatchT, Running[ResultT]] | None = None

    @property
    def is_running(self) -> bool:
        return self._running is not None

    @property
    def is_computing(self) -> bool:
        return False

    def drain(self, stages: Stages) -> None:
        last = self._finish(stages)
        if last is not None:
            stages.report(*last)

    def _finish(self, stages: Stages) -> tuple[BatchT, ResultT] | None:
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

    @property
    def is_computing(self) -> bool:
        return self._running is not None and not self._running[1].done()

    def step(self, stages: Stages) -> None:
        if stages.waits_for_tokens():
            self.drain(stages)
        batch = _prepare_next(stages)
        last = self._finish(stages)
        if batch is not None:
            stages.launch(batch)
            stages.commit(batch)
            self._running = batch, self._start(stages, batch)
        if last is not None:
            stages.report(*last)

    def _start(self, stages: Stages, batch: Prepared) -> Running:
        is_on_its_way = threading.Event()

        def compute() -> object:
            is_on_its_way.set()
            return stages.compute(batch).result()

        future = self._worker.submit(compute)
        # The interpreter belongs to the worker until the model gives it back: reporting first would hold the model up.
        is_on_its_way.wait()
        return future


class LaunchedAhead(_Behind):
    """The next step is launched behind the one that an asynchronous device computes, and takes its tokens there; the
    host waits for those of a step only when the next one is on its way. A batch that needs them sooner is launched once
    they are there.
    """

    def step(self, stages: Stages) -> None:
        if stages.waits_for_tokens():
            self.drain(stages)
        batch = _prepare_next(stages)
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

    def _launch(self, stages: Stages, batch: Prepared | None) -> tuple[Prepared, Running] | None:
        if batch is None:
            return None
        stages.launch(batch)
        return batch, stages.compute(batch)
