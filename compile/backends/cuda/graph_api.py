"""What capturing CUDA graphs takes of a device: torch.cuda's graphs on a card; tests have their own."""

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
    """All graphs of one api share a pool of memory. Results own their part of it: once they are dropped, the graphs
    captured later may write there. `borrowed` reads it all the same.
    """

    def warm_up(self, run: Callable[[], object]) -> None:
        """Runs once, and is done when it returns."""

    def capture(self, run: Callable[..., Any], *inputs: object) -> tuple[Replay, Any]:
        """(what launches run(*inputs) again over the same memory, its results)."""

    def borrowed(self, tensor: Tensor) -> Tensor:
        """A tensor's memory without its ownership."""


@dataclass(frozen=True)
class CaptureStreams:
    """Two, because a library's workspace belongs to a thread and a stream: a graph writes to that of the stream that it
    was captured on whenever it is replayed, which a trial run must not do meanwhile.

    Made once a model: torch deals out 32 streams in turns, so that new ones for each capture would in the end be those
    that others work on.
    """

    captures: torch.cuda.Stream
    trials: torch.cuda.Stream

    @staticmethod
    def of(device: torch.device) -> CaptureStreams:
        return CaptureStreams(torch.cuda.Stream(device), torch.cuda.Stream(device))


class CudaGraphApi:
    """torch.cuda's graphs, on streams of their own, so that capture and serving do not meet. Of one thread."""

    def __init__(self, streams: CaptureStreams) -> None:
        self._streams = streams
        self._pool = torch.cuda.graph_pool_handle()
        self._has_workspaces = False

    def warm_up(self, run: Callable[[], object]) -> None:
        """Compiles kernels and lets libraries load theirs, which capture must not do.

        Comes after what the default stream has been given so far: weights on their way, caches being zeroed.
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
                self._pool = torch.cuda.graph_pool_handle()  # torch may think that the old one is still recorded to
                raise
        return graph.replay, results

    def _take_workspaces(self) -> None:
        """cuBLAS's of this thread and stream. Taken within a capture they would keep the pool from being given back."""
        if not self._has_workspaces:
            x = torch.zeros(16, 16, dtype=torch.bfloat16, device=self._streams.captures.device)
            F.linear(x, x)
            F.linear(x, x, x[0])  # cuBLASLt
            self._has_workspaces = True

    def borrowed(self, tensor: Tensor) -> Tensor:
        """Goes by the bytes of the storage: the interface has no name for bfloat16."""
        storage, item = tensor.untyped_storage(), tensor.element_size()
        if storage.nbytes() == 0:
            return tensor
        memory = _Memory(storage.data_ptr(), storage.nbytes() // item * item)
        whole = torch.as_tensor(memory, device=tensor.device).view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _Memory:
    """Bytes on the device as the CUDA array interface (version 2) describes them."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (num_bytes,), "strides": None, "typestr": "|u1", "version": 2,
        }  # fmt: skip
