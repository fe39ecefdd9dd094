"""Clocks: how long a call takes on the host, and on a GPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]
FLUSHED_BYTES = 256 << 20
"""Bytes written before a timed call so that a GPU's L2 cache holds nothing of its own."""


class Clock(Protocol):
    """Seconds that a device takes for one call. Raises what the call raises."""

    def __call__(self, call: Call) -> float: ...


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
            self._other.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.current_stream().synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def times_in_turns(calls: Sequence[Call], rounds: int, max_seconds: float = math.inf) -> list[list[float]]:
    """Wall-clock seconds of every call, one list a call: they take turns, so that a busy machine slows all alike.

    No round begins after `max_seconds`; one is always measured.
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
