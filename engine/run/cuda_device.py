"""A CUDA GPU as the engine's device. All that the engine asks of torch.cuda is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fuseline.compile.config import Progress
from fuseline.compile.kernels.triton import sampling
from fuseline.compile.residency.uploads import DeviceInputs, Layout, num_bytes, views
from fuseline.compile.specs import ModelInfo
from fuseline.compile.target import Target
from fuseline.engine.memory.sizing import KVBudget, Memory, ProfiledMemory, kv_budget_on_gpu
from fuseline.engine.run.device import SampleOps

if TYPE_CHECKING:
    from fuseline.compile.backends.cuda.model import CudaModel


class CudaResults:
    """One piece of memory on the GPU, one copy to pinned memory, one event behind it."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout = layout
        self._memory = torch.zeros(num_bytes(layout), dtype=torch.uint8, device=device)
        self.tensors = views(self._memory, layout)

    def send(self) -> None:
        self._host = torch.empty(self._memory.shape, dtype=torch.uint8, pin_memory=True)
        self._host.copy_(self._memory, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def read(self) -> dict[str, Tensor]:
        self._done.synchronize()
        return views(self._host, self._layout)


class CudaDevice:
    is_asynchronous = True

    def __init__(self, target: Target) -> None:
        self._device = torch.device(target.device)
        self._uploads = DeviceInputs(self._device)
        self.name = f"{torch.cuda.get_device_name(self._device)} ({target.isa})"
        self.ops = SampleOps(sampling.sample, sampling.row_logprobs)

    def memory(self) -> Memory:
        return Memory(*torch.cuda.mem_get_info(self._device))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def kv_budget(self, info: ModelInfo, share: float, before: Memory, steps: ProfiledMemory) -> KVBudget:
        return kv_budget_on_gpu(info, share, before, self.memory(), steps)

    def profile(self, runs: Sequence[Callable[[], None]]) -> int:
        # The memory that torch takes from the GPU counts, not what tensors fill: it cannot give away the gaps between.
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_reserved(self._device)
        for run in runs:
            run()
            torch.cuda.synchronize(self._device)
        taken = torch.cuda.max_memory_reserved(self._device) - before
        torch.cuda.empty_cache()
        return taken

    def capture_graphs(self, model: CudaModel, progress: Progress) -> None:
        model.capture_graphs(progress)

    def stop_capture(self, model: CudaModel) -> None:
        model.stop_capture()

    def upload(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._uploads.upload(tensors)

    def results(self, layout: Layout) -> CudaResults:
        return CudaResults(layout, self._device)
