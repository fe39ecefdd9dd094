"""The device a model runs on, as the engine sees it: its kernels, its memory, and how tensors get there and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fuseline.compile.config import Progress
from fuseline.compile.residency.uploads import Layout
from fuseline.compile.specs import ModelInfo
from fuseline.engine.memory.free_memory import free_memory
from fuseline.engine.memory.sizing import KVBudget, Memory, ProfiledMemory, kv_budget_on_host


@dataclass(frozen=True)
class SampleOps:
    """The two ops of csrc/cpu/ops.def, arguments in schema order, outputs written in place."""

    sample: Callable[..., None]
    row_logprobs: Callable[..., None]


class Results(Protocol):
    """Outputs of a step's kernels on the device, which the host reads once."""

    tensors: dict[str, Tensor]
    """On the device, all zeros at first."""

    def send(self) -> None:
        """Everything that writes them has been launched: they go to the host as soon as it is done."""

    def read(self) -> dict[str, Tensor]:
        """On the host. Waits for what was launched before `send`, and for nothing else."""


class Device(Protocol):
    """`is_asynchronous`: work is only launched, done in the order of its launches, and its results are waited for."""

    is_asynchronous: bool
    name: str
    ops: SampleOps

    def memory(self) -> Memory: ...

    def synchronize(self) -> None:
        """Wait for all that was launched."""

    def kv_budget(self, info: ModelInfo, share: float, before: Memory, steps: ProfiledMemory) -> KVBudget:
        """Memory for the KV cache now that the model is loaded; `before` is the memory of a time when it was not.

        `share` is that of --gpu-memory-utilization.
        """

    def profile(self, runs: Sequence[Callable[[], None]]) -> int:
        """Bytes that the runs take at most, beside what is in use. 0, and nothing run, where nothing is gained by it.

        Kernels are compiled and libraries loaded this way before the first request comes.
        """

    def capture_graphs(self, model: object, progress: Progress) -> None:
        """Begin to capture what can be replayed, in the background, once the model's caches are there."""

    def stop_capture(self, model: object) -> None:
        """Wait for what is being captured, and begin no more."""

    def upload(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the host on the device; valid until the next upload."""

    def results(self, layout: Layout) -> Results: ...


@dataclass(frozen=True)
class HostResults:
    tensors: dict[str, Tensor]

    def send(self) -> None:
        """They are there already."""

    def read(self) -> dict[str, Tensor]:
        return self.tensors


class HostDevice:
    """Kernels are done when they return, and work on the host's own memory."""

    is_asynchronous = False

    def __init__(self, ops: SampleOps, name: str = "cpu") -> None:
        self.ops = ops
        self.name = name

    def memory(self) -> Memory:
        return Memory(free_memory(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))

    def synchronize(self) -> None:
        """All is done already."""

    def kv_budget(self, info: ModelInfo, share: float, before: Memory, steps: ProfiledMemory) -> KVBudget:
        return kv_budget_on_host(info, share, before, self.memory())

    def profile(self, runs: Sequence[Callable[[], None]]) -> int:
        return 0

    def capture_graphs(self, model: object, progress: Progress) -> None:
        """Nothing to capture on a CPU."""

    def stop_capture(self, model: object) -> None:
        """There is none."""

    def upload(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def results(self, layout: Layout) -> HostResults:
        return HostResults({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in layout.items()})


def native_ops() -> SampleOps:
    """The kernels of csrc/cpu/kernels/sampling.cpp."""
    import fuseline._C  # noqa: F401 (registers them with torch)

    return SampleOps(torch.ops.fuseline_cpu.sample, torch.ops.fuseline_cpu.row_logprobs)
