"""Tensors on large pages: weights and caches are read faster with fewer TLB misses."""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20
"""Address space reserved at a time. Unused pages cost nothing, since the system supplies pages at the first write."""
LARGE_PAGE = 2 << 20
HOST_REGISTER_MAPPED = 2
"""cudaHostRegisterMapped: kernels may access the memory at its host address."""
ALIGNMENT = 128
"""Alignment of tensors in bytes: two cache lines, which are fetched in pairs."""


class Pages:
    """Tensors with a common lifetime, contiguous in memory; it is freed with the last of them.

    Small tensors share large pages this way, and prefetches past a tensor's end read the next one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = np.empty(0, np.uint8)
        self._used = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros. torch.zeros would write all of its pages."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.zeros(tuple(shape), dtype=dtype)
        return torch.from_numpy(self._take(num_bytes)).view(dtype).view(tuple(shape))

    def _take(self, num_bytes: int) -> np.ndarray:
        with self._lock:
            begin = -(-self._used // ALIGNMENT) * ALIGNMENT
            if begin + num_bytes > len(self._chunk):
                self._chunk, begin = self._map(num_bytes), 0
            self._used = begin + num_bytes
            return self._chunk[begin : self._used]

    def _map(self, num_bytes: int) -> np.ndarray:
        """Maps a chunk of at least that size."""
        return _map(max(CHUNK_BYTES, num_bytes))


class PinnedPages(Pages):
    """Pages that a GPU copies from and to, and that its kernels access: one mapping per tensor.

    torch rounds pinned memory up to powers of two, which for the gigabytes of a model can waste almost half.
    """

    def _map(self, num_bytes: int) -> np.ndarray:
        memory = _map(num_bytes)
        begin, cudart = memory.ctypes.data, torch.cuda.cudart()
        status = cudart.cudaHostRegister(begin, num_bytes, HOST_REGISTER_MAPPED)
        if status != cudart.cudaError.success:
            reason = cudart.cudaGetErrorString(status)
            _forget_error()
            raise MemoryError(f"{num_bytes / 2**30:.2f} GiB of host memory cannot be pinned: {reason}")
        # The array that all views of the mapping keep alive.
        owner = memory if memory.base is None else memory.base
        weakref.finalize(owner, cudart.cudaHostUnregister, begin).atexit = False
        return memory


def host_pages(device: torch.device) -> Pages:
    """Host memory for copies to and from the device."""
    return PinnedPages() if device.type == "cuda" else Pages()


def _forget_error() -> None:
    """Clears the runtime's last error of this thread, which the next launch would otherwise report."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _map(num_bytes: int) -> np.ndarray:
    """Maps zeros, aligned to large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(num_bytes, np.uint8)
    # Shared mappings, the default of mmap, get no large pages.
    pages = mmap.mmap(-1, num_bytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    begin = -memory.ctypes.data % LARGE_PAGE
    return memory[begin : begin + num_bytes]
