"""Times a kernel on a GPU, and compares its results with the default's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fuseline.compile.kernels.registry import Implementation
from fuseline.compile.tuning.clock import DeviceClock
from fuseline.compile.tuning.recording import recording

REPEATS = 7
TOLERANCE = 2.0**-7
"""How far results may be from the default's, as a share of the largest number: some roundings of bf16."""


@dataclass(frozen=True)
class Arguments:
    """Calls of one op and size, one tuple per weight, used in turn. `host`: their host inputs to `prepare`."""

    calls: Sequence[tuple]
    host: Mapping[str, Tensor] | None = None


Timer = Callable[[Implementation, Arguments], float]
"""Seconds of device time per call. Propagates errors of the candidate."""


class DeviceTimer:
    """Times a captured graph of the calls, free of host overhead; the L2 cache is cold before a replay.

    The first candidate for some arguments is the default. Raises ValueError for another whose results are not its.
    """

    def __init__(self, device: str = "cuda") -> None:
        self._clock = DeviceClock(device, REPEATS, warm_ups=1)
        self._stream = torch.cuda.Stream()
        self._expected: tuple[Arguments, str, list[Tensor]] | None = None

    def __call__(self, candidate: Implementation, arguments: Arguments) -> float:
        self._stream.wait_stream(torch.cuda.current_stream())  # the arguments are computed there
        with torch.cuda.stream(self._stream):
            if candidate.prepare:
                candidate.prepare(arguments.host)
            found = candidate.run(*arguments.calls[0])  # compiles and allocates workspaces, not allowed during capture
            self._stream.synchronize()
            self._compare(candidate, arguments, found)
            with recording() as graph:
                for args in arguments.calls:
                    candidate.run(*args)
            return self._clock(graph.replay) / len(arguments.calls)

    def _compare(self, candidate: Implementation, arguments: Arguments, found: object) -> None:
        results = [each for each in pytree.tree_leaves(found) if isinstance(each, Tensor)]
        if self._expected is None or self._expected[0] is not arguments:
            self._expected = arguments, candidate.label, results
            return
        _, label, expected = self._expected
        for ours, theirs in zip(expected, results, strict=True):
            error = (ours.float() - theirs.float()).abs().max().item() if ours.numel() else 0.0
            largest = ours.float().abs().max().item() if ours.numel() else 0.0
            if not error <= TOLERANCE * largest:
                raise ValueError(f"its results differ from those of {label} by up to {error:.3g} of {largest:.3g}")
