"""Clocks: how long a call takes on the host, and on a GPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
FLUSHED_BYTES = 256 << 20
"""Bytes written before a timed call to evict its data from the GPU's L2 cache."""
HEAD_START = 16
"""Times that they are written: about a millisecond of an H200, in which the host launches the call. Otherwise a call of
few microseconds would be timed by what its launches cost the host."""
Clock = Callable[[Call], float]
"""Measures seconds of device time per call. Propagates errors of the call."""


class HostClock:
    """Shortest wall-clock time of several calls, since other programs can only make a call slower."""

    def __init__(self, repeats: int = 7, warm_ups: int = 1) -> None:
        self._repeats, self._warm_ups = repeats, warm_ups

    def __call__(self, call: Call) -> float:
        for _ in range(self._warm_ups):
            call()
        (times,) = times_in_turns([call], self._repeats)
        return min(times)


class DeviceClock:
    """Median time between CUDA events around the call, on the current stream, with a cold L2 cache each time."""

    def __init__(self, device: str = "cuda", repeats: int = 20, warm_ups: int = 3) -> None:
        self._other = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
        self._repeats, self._warm_ups = repeats, warm_ups

    def __call__(self, call: Call) -> float:
        for _ in range(self._warm_ups):
            call()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self._repeats)]
        for begin, end in pairs:
            for _ in range(HEAD_START):
                self._other.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.current_stream().synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def times_in_turns(calls: Sequence[Call], rounds: int, max_seconds: float = math.inf) -> list[list[float]]:
    """Wall-clock seconds, one list per call. Calls are interleaved, so load on the machine affects all alike.

    No round starts after `max_seconds`; at least one is measured.
    """
    times: list[list[float]] = [[] for _ in calls]
    deadline = time.perf_counter() + max_seconds
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            found.append(time.perf_counter() - begin)
        if time.perf_counter() > deadline:
            break
    return times
