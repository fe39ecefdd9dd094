"""Records the work of the current CUDA stream as a graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import py_object, pythonapi

import torch


@contextmanager
def recording(pool: tuple[int, int] | None = None) -> Iterator[torch.cuda.CUDAGraph]:
    """What this thread gives the current stream becomes a graph, over memory of the pool (None: of one of its own).

    Not torch.cuda.graph(): it stops the whole device first. Other threads go on, whatever they ask of the device but to
    wait for all of it. What is raised within is what comes out: the capture that it has spoilt ends in another error.
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
    """Of a spoilt capture torch (2.11 to 2.13) forgets to tell its allocators, which go on asking the graph whether a
    stream records. So it lives forever; and as long as they think that something records, they give nothing back."""
    pythonapi.Py_IncRef(py_object(graph))
    device = torch.cuda.current_device()
    for tell in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with suppress(RuntimeError):  # it was told: the graph could not be made of what was recorded
            tell(device, pool)
