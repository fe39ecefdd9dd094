"""Device interface for CUDA graph capture: torch.cuda's graphs on a GPU; tests substitute their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.tuning.recording import recording

Replay = Callable[[], None]


class GraphApi(Protocol):
    """All graphs of one api share a memory pool. Results own their part of it: once they are dropped, graphs captured
    later may write there. `borrowed` gives a view without ownership.
    """

    def warm_up(self, run: Callable[[], object]) -> None:
        """Runs once and waits for completion."""

    def capture(self, run: Callable[..., Any], *inputs: object) -> tuple[Replay, Any]:
        """Returns (a function that replays run(*inputs) in the same memory, its results)."""

    def borrowed(self, tensor: Tensor) -> Tensor:
        """A view of a tensor's memory without ownership."""


@dataclass(frozen=True)
class CaptureStreams:
    """Two streams, because a library's workspace belongs to a thread and a stream: every replay writes to the workspace
    of the capture stream, which a concurrent trial run must not share.

    Created once per model: torch hands out 32 streams round-robin, so new streams for each capture would eventually
    be in use elsewhere.
    """

    captures: torch.cuda.Stream
    trials: torch.cuda.Stream

    @staticmethod
    def of(device: torch.device) -> CaptureStreams:
        return CaptureStreams(torch.cuda.Stream(device), torch.cuda.Stream(device))


class CudaGraphApi:
    """torch.cuda's graphs on dedicated streams, so capture does not interfere with serving. Used by one thread."""

    def __init__(self, streams: CaptureStreams) -> None:
        self._streams = streams
        self._pool = torch.cuda.graph_pool_handle()
        self._has_workspaces = False

    def warm_up(self, run: Callable[[], object]) -> None:
        """Compiles kernels and makes libraries load theirs, which is not allowed during capture.

        Ordered after work already on the default stream: weight uploads, zeroing of caches.
        """
        stream = self._streams.trials
        stream.wait_stream(torch.cuda.default_stream(stream.device))
        with torch.cuda.stream(stream):
            run()
        stream.synchronize()

    def capture(self, run: Callable[..., Any], *inputs: object) -> tuple[Replay, Any]:
        with torch.cuda.stream(self._streams.captures):
            self._take_workspaces()
            try:
                with recording(self._pool) as graph:
                    results = run(*inputs)
            except BaseException:
                self._pool = torch.cuda.graph_pool_handle()  # torch may consider the old pool still in capture
                raise
        return graph.replay, results

    def _take_workspaces(self) -> None:
        """Allocates cuBLAS's workspaces for this thread and stream; within a capture they would pin the pool."""
        if not self._has_workspaces:
            x = torch.zeros(16, 16, dtype=torch.bfloat16, device=self._streams.captures.device)
            F.linear(x, x)
            F.linear(x, x, x[0])  # cuBLASLt
            self._has_workspaces = True

    def borrowed(self, tensor: Tensor) -> Tensor:
        """Views the storage as bytes: the array interface has no bfloat16."""
        storage, item = tensor.untyped_storage(), tensor.element_size()
        if storage.nbytes() == 0:
            return tensor
        memory = _Memory(storage.data_ptr(), storage.nbytes() // item * item)
        whole = torch.as_tensor(memory, device=tensor.device).view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _Memory:
    """Device bytes exposed through the CUDA array interface (version 2)."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (num_bytes,), "strides": None, "typestr": "|u1", "version": 2,
        }  # fmt: skip
