"""Records the work of the current CUDA stream as a graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import py_object, pythonapi

import torch


@contextmanager
def recording(pool: tuple[int, int] | None = None) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures this thread's work on the current stream as a graph in the pool's memory (None: a new pool).

    Not torch.cuda.graph(), which synchronizes the device first. Other threads may use the device meanwhile, except to
    synchronize all of it. An exception in the body propagates, not the error of the capture that it invalidated.
    """
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield graph
    except BaseException:
        with suppress(RuntimeError):
            _end(graph, pool)
        raise
    _end(graph, pool)


def _end(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        _abandon(graph, pool)
        raise


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """After an invalidated capture torch (2.11 to 2.13) does not notify its allocators, which keep asking the graph if
    a stream is capturing. So the graph is kept alive forever; until notified, the allocators free no memory."""
    pythonapi.Py_IncRef(py_object(graph))
    device = torch.cuda.current_device()
    for tell in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with suppress(RuntimeError):  # already notified: instantiating the graph failed
            tell(device, pool)
