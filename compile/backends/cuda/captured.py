"""What graphs of whole steps have in common: fixed memory that they read, and their capture, size by size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from fuseline.compile.backends.cuda.executable import CudaExecutable
from fuseline.compile.backends.cuda.graph_api import GraphApi, Replay
from fuseline.compile.backends.cuda.segments import map_tensors
from fuseline.compile.graph_inputs import GraphOutput


class FixedInputs(Protocol):
    """Fixed memory of a graph's inputs."""

    def values(self, size: int) -> dict[str, Tensor]:
        """Graph inputs by placeholder name, of a step of `size`."""

    def pad(self, size: int) -> None:
        """Fills a step of `size` with padding, by the kernels that a replay will launch before it."""


Inputs = TypeVar("Inputs", bound=FixedInputs)


@dataclass(frozen=True)
class StepGraph:
    """A captured step; `results` are those of the last replay."""

    replay: Replay
    results: GraphOutput


@dataclass
class StepGraphs(Generic[Inputs]):
    """Graphs of whole steps, by padded size."""

    executable: CudaExecutable
    caches: Mapping[str, Tensor]
    sizes: tuple[int, ...]
    make_inputs: Callable[[int], Inputs]
    api: GraphApi
    captured: dict[int, StepGraph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._inputs = self.make_inputs(max(self.sizes)) if self.sizes else None

    def capture(self, size: int, num_warmups: int) -> None:
        for _ in range(num_warmups):
            self.api.warm_up(lambda: self._try(size))
        fixed = self._inputs.values(size)
        replay, found = self.api.capture(lambda: self.executable.run({**self.caches, **fixed}))
        self.captured[size] = StepGraph(replay, map_tensors(found, self.api.borrowed))

    def _try(self, size: int) -> GraphOutput:
        inputs = self.make_inputs(size)
        inputs.pad(size)  # compiles what fills them before the first replay
        return self.executable.run({**self.caches, **inputs.values(size)}, is_trial=True)
