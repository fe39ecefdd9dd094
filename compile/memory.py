"""Tensors on large pages: what is streamed once a step is read faster when fewer pages must be looked up."""

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
"""Address space taken at a time. Pages are supplied when they are first written: what is not used costs nothing."""
LARGE_PAGE = 2 << 20
HOST_REGISTER_MAPPED = 2
"""cudaHostRegisterMapped: kernels may use the memory, at the address that it has on the host."""
ALIGNMENT = 128
"""Of tensors in bytes: two cache lines, which are fetched in pairs."""


class Pages:
    """Tensors that live and die together, one after the other in memory; freed with the last of them.

    Small ones share large pages this way, and a kernel that reads ahead finds the tensor that was made next.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = np.empty(0, np.uint8)
        self._used = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros. torch.zeros would write them all."""
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
        """A chunk of at least that size."""
        return _map(max(CHUNK_BYTES, num_bytes))


class PinnedPages(Pages):
    """The same where a card copies from and to, and its kernels read and write: a mapping for each tensor.

    torch's own pinned memory comes in powers of two, which for the gigabytes of a model wastes up to as much again.
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
    """Host memory for copies from and to the device."""
    return PinnedPages() if device.type == "cuda" else Pages()


def _forget_error() -> None:
    """The runtime keeps this thread's last error for the next launch to find, which has nothing to do with it."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _map(num_bytes: int) -> np.ndarray:
    """Zeros from a border of large pages on."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(num_bytes, np.uint8)
    # Shared mappings, mmap's default, get no large pages.
    pages = mmap.mmap(-1, num_bytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    begin = -memory.ctypes.data % LARGE_PAGE
    return memory[begin : begin + num_bytes]
