"""The library of CUDA C++ kernels (csrc/cuda): plain C functions, found by name, called with addresses and numbers.

It is a shared object of its own, `_cuda.so` beside `fuseline._C`, and knows no torch: the same file serves every torch,
and a call costs the host a few microseconds. Functions and the types of their arguments come from the library itself.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import logging
import struct
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

import fuseline
from fuseline.compile.target import Target

logger = logging.getLogger(__name__)
DTYPES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 5, torch.float8_e4m3fn: 5, torch.float8_e5m2: 6,
}  # fmt: skip
"""Codes of csrc/include/fuseline/op.h and, for caches, csrc/cuda/fp8.h: bytes are e4m3."""


class Overlap(IntEnum):
    """Which kernels may begin while the one ahead of them on the stream still runs (programmatic dependent launch).

    Values of csrc/cuda/kernels.h.
    """

    NONE = 0
    HEADS = 1
    """Those that touch no memory before that one has ended: never wrong."""
    WEIGHTS = 2
    """Also those that read a weight sooner: right if nothing on the device writes it, neither kernel nor copy."""


class _Entry(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("types", ctypes.c_char_p)]


class CudaLibrary:
    """`problem` says why it cannot run on the present device; empty when it can. `overlap` is what is asked for in its
    calls: HEADS, or NONE where code or driver cannot overlap."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.fuseline_cuda_entries.restype = ctypes.POINTER(_Entry)
        library.fuseline_cuda_problem.restype = library.fuseline_cuda_describe.restype = ctypes.c_char_p
        self.problem = library.fuseline_cuda_problem().decode()
        self.overlap = Overlap.HEADS if library.fuseline_cuda_can_overlap() else Overlap.NONE
        self._describe = library.fuseline_cuda_describe
        self._functions: dict[str, Callable[[int | None, int, bytes], int]] = {}
        self._packs: dict[str, Callable[..., bytes]] = {}
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
        for entry in library.fuseline_cuda_entries():
            if not entry.name:
                break
            name = entry.name.decode()
            self._functions[name] = prototype(entry.function)
            self._packs[name] = struct.Struct(entry.types.decode()).pack
        self._library = library

    def overlapping(self, overlap: Overlap) -> CudaLibrary:
        """The same library, asked for this overlap where it can any."""
        other = copy.copy(self)
        other.overlap = overlap if self.overlap else Overlap.NONE
        return other

    def call(self, name: str, device: Tensor, *args: int | float) -> None:
        """Puts a function's kernels on the current stream of `device`'s device.

        Raises struct.error for arguments that are not those of the function, RuntimeError for what the device refuses.
        """
        packed = self._packs[name](*args)
        stream = torch._C._cuda_getCurrentRawStream(device.device.index) if device.is_cuda else None
        error = self._functions[name](stream, self.overlap, packed)
        if error:
            raise RuntimeError(f"cuda.{name}: {self._describe(error).decode()}")


def library_for(target: Target) -> CudaLibrary | None:
    """The installed library if the target is a card that it runs on."""
    library = _installed() if target.device == "cuda" else None
    return library if library is None or target.overlaps else library.overlapping(Overlap.NONE)


@functools.cache
def _installed() -> CudaLibrary | None:
    path = Path(fuseline.__file__).parent / "_cuda.so"
    if not path.exists():
        return None
    try:
        library = CudaLibrary(path)
    except OSError as error:
        logger.warning("no CUDA C++ kernels: %s", error)
        return None
    if library.problem:
        logger.warning("no CUDA C++ kernels: %s", library.problem)
        return None
    return library


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
