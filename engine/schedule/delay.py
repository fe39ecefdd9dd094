"""--scheduler-delay-factor: waiting prompts are gathered for a while, so that a step computes several of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from fuseline.engine.state.sequence import Sequence


class PromptDelay:
    """Prompts wait for `factor` times the seconds that the last step with new prompts took, while others run."""

    def __init__(self, factor: float, clock: Callable[[], float] = time.time) -> None:
        self._factor = factor
        self._clock = clock
        """Of the same kind as the arrival times of requests."""
        self._began: float | None = None
        """When the last step began, if it has new prompts."""
        self._latency = 0.0

    def is_over(self, waiting: Iterable[Sequence], has_running: bool) -> bool:
        """Whether prompts may start in the step that is being scheduled. To be asked once for each step."""
        now = self._clock()
        if self._began is not None:
            self._latency, self._began = now - self._began, None
        first = min((seq.request.arrival_time for seq in waiting), default=now)
        return not has_running or now - first >= self._factor * self._latency

    def started(self) -> None:
        """The step has new prompts."""
        self._began = self._clock()
