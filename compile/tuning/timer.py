"""Times a kernel on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fuseline.compile.kernels.registry import Implementation
from fuseline.compile.tuning.clock import DeviceClock
from fuseline.compile.tuning.recording import recording

REPEATS = 7


@dataclass(frozen=True)
class Arguments:
    """Calls of one op and size, one tuple per weight, used in turn. `host`: their host inputs to `prepare`."""

    calls: Sequence[tuple]
    host: Mapping[str, Tensor] | None = None


class Timer(Protocol):
    def __call__(self, candidate: Implementation, arguments: Arguments) -> float:
        """Seconds of device time per call. Propagates errors of the candidate."""


class DeviceTimer:
    """Times a captured graph of the calls, free of host overhead; the L2 cache is cold before a replay."""

    def __init__(self, device: str = "cuda") -> None:
        self._clock = DeviceClock(device, REPEATS, warm_ups=1)
        self._stream = torch.cuda.Stream()

    def __call__(self, candidate: Implementation, arguments: Arguments) -> float:
        self._stream.wait_stream(torch.cuda.current_stream())  # the arguments are computed there
        with torch.cuda.stream(self._stream):
            if candidate.prepare:
                candidate.prepare(arguments.host)
            candidate.run(*arguments.calls[0])  # compiles and allocates workspaces, not allowed during capture
            self._stream.synchronize()
            with recording() as graph:
                for args in arguments.calls:
                    candidate.run(*args)
            return self._clock(graph.replay) / len(arguments.calls)
