"""How long a kernel takes on a card."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fuseline.compile.backends.cuda.graph_api import recording
from fuseline.compile.kernels.registry import Implementation

FLUSHED = 256 << 20
"""Bytes written to leave nothing else in the L2 cache."""
REPEATS = 7


@dataclass(frozen=True)
class Arguments:
    """Calls of one op and size, one tuple for each weight that is read in turns. `host`: inputs to prepare for them."""

    calls: Sequence[tuple]
    host: Mapping[str, Tensor] | None = None


class Timer(Protocol):
    def __call__(self, candidate: Implementation, arguments: Arguments) -> float:
        """Seconds that the device takes for one call. Raises what the candidate raises."""


class CardTimer:
    """Median of CUDA events around a graph of the calls, which the host cannot hold up; the L2 cache holds nothing of
    theirs before a replay."""

    def __init__(self, device: str = "cuda") -> None:
        self._other = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream()

    def __call__(self, candidate: Implementation, arguments: Arguments) -> float:
        self._stream.wait_stream(torch.cuda.current_stream())  # the arguments are made there
        with torch.cuda.stream(self._stream):
            if candidate.prepare:
                candidate.prepare(arguments.host)
            candidate.run(*arguments.calls[0])  # compiles and takes workspaces, which a capture must not do
            self._stream.synchronize()
            with recording() as graph:
                for args in arguments.calls:
                    candidate.run(*args)
            return self._median(graph) / len(arguments.calls)

    def _median(self, graph: torch.cuda.CUDAGraph) -> float:
        graph.replay()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
        for begin, end in pairs:
            self._other.zero_()
            begin.record()
            graph.replay()
            end.record()
        self._stream.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3
