"""What comes in between two steps is bounded by time: the tokens of those that run do not wait for a crowd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from engine_client_cases import make_request
from rounds import WorkClock

from fuseline.engine import service
from fuseline.engine.messages import Shutdown
from fuseline.engine.service import MESSAGES_SECONDS, EngineService

NUM_MESSAGES = 200


class Inbox:
    """Has all messages from the beginning; each takes some time to decode and to queue."""

    def __init__(self, clock: WorkClock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds
        self._messages = [make_request(f"r{k}") for k in range(NUM_MESSAGES)] + [Shutdown()]

    def wake(self) -> None:
        pass

    def receive(self, wait: bool):
        self._clock.work(self._seconds)
        return self._messages.pop(0)


@pytest.mark.parametrize("seconds", [1e-5, 1e-4, 1e-3, 1e-2])
def test_messages_are_handled_for_a_short_time_between_two_steps(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    clock, added, steps = WorkClock(), [], []
    monkeypatch.setattr(service, "perf_counter", clock)

    def step() -> str:
        steps.append((len(added), clock.now))
        return "outputs"

    served = object.__new__(EngineService)
    grammars = SimpleNamespace(on_ready=None, close=lambda: None)
    served.engine = SimpleNamespace(
        has_work=True, step=step, add=added.append, runner=SimpleNamespace(model=None), grammars=grammars,
        slow_masks=grammars, admit_compiled=lambda: None, is_computing=False,
    )
    served.device, served.send = SimpleNamespace(stop_capture=lambda model: None), lambda message: None
    served.run(Inbox(clock, seconds))
    assert len(added) == NUM_MESSAGES
    gaps = [after[1] - before[1] for before, after in zip(steps, steps[1:], strict=False)]
    assert max(gaps, default=0.0) <= MESSAGES_SECONDS + 2 * seconds + 1e-9
    counts = [after[0] - before[0] for before, after in zip(steps, steps[1:], strict=False)]
    assert min(counts, default=1) >= 1, "there is progress"


def test_all_messages_are_handled_while_a_thread_computes() -> None:
    clock, added = WorkClock(), []
    served = object.__new__(EngineService)
    served.engine = SimpleNamespace(has_work=True, is_computing=True, add=added.append)
    assert not served._take_messages(Inbox(clock, 1e-3)), "the last one says that it is to shut down"
    assert len(added) == NUM_MESSAGES
