"""What capturing CUDA graphs takes of a device: torch.cuda's graphs on a card; tests have their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

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


class CudaGraphApi:
    """torch.cuda's graphs, on a stream of their own, so that capture and serving do not meet."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object]) -> None:
        """Compiles kernels and lets libraries load theirs and take workspaces, which capture must not do.

        Comes after what the default stream has been given so far: weights on their way, caches being zeroed.
        """
        self._stream.wait_stream(torch.cuda.default_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            run()
        self._stream.synchronize()

    def capture(self, run: Callable[..., Any], *inputs: object) -> tuple[Replay, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Not torch.cuda.graph(): it collects garbage and stops the whole device first. Other threads go on.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                results = run(*inputs)
            finally:
                graph.capture_end()
        return graph.replay, results

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
