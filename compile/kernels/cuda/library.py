"""The library of CUDA C++ kernels (csrc/cuda): plain C functions, found by name, called with named arguments.

It is a shared object of its own, `_cuda.so` beside `fuseline._C`, and knows no torch: the same file serves every torch,
and a call costs the host a few microseconds. Functions and the names and types of their arguments come from the library
itself, which has them from csrc/cuda/kernels.def.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import logging
import operator
import struct
from collections.abc import Callable, Mapping, Set
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

import fuseline
from fuseline.compile.kernels.registry import NATIVE, Implementation, OpCall, with_library
from fuseline.compile.target import Target

logger = logging.getLogger(__name__)
DTYPES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 5, torch.float8_e4m3fn: 5, torch.float8_e5m2: 6,
}  # fmt: skip
"""Codes of csrc/include/fuseline/op.h and, for caches, csrc/cuda/fp8.h: bytes are e4m3."""
BULK_ISAS = ("sm_90", "sm_100", "sm_103")
"""GPUs with bulk copies and 227 KiB of shared memory a block."""


class Overlap(IntEnum):
    """Kernels that may begin while the one ahead of them on the stream still runs (programmatic dependent launch).

    Values of csrc/cuda/kernels.h.
    """

    NONE = 0
    HEADS = 1
    """Those that touch no memory before that one has ended: never wrong."""
    WEIGHTS = 2
    """Also those that read a weight sooner: right if nothing on the device writes it, neither kernel nor copy."""


class _Entry(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("fields", ctypes.c_char_p)]


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
        self._fields: dict[str, tuple[Callable[[Mapping], tuple], Callable[..., bytes], frozenset[str]]] = {}
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
        for entry in library.fuseline_cuda_entries():
            if not entry.name:
                break
            name = entry.name.decode()
            self._functions[name] = prototype(entry.function)
            fields = entry.fields.decode().split()
            names = tuple(field[1:] for field in fields)
            pack = struct.Struct("".join(field[0] for field in fields)).pack
            self._fields[name] = operator.itemgetter(*names), pack, frozenset(names)
        self._library = library

    def overlapping(self, overlap: Overlap) -> CudaLibrary:
        """The same library, asked for this overlap where it can any."""
        other = copy.copy(self)
        other.overlap = overlap if self.overlap else Overlap.NONE
        return other

    def call(self, name: str, on: Tensor, **fields: Tensor | int | float | None) -> None:
        """Puts a function's kernels on the current stream of the device of `on`. A tensor is given by its address.

        Raises TypeError for a field that is missing or unknown or of another type, RuntimeError for what the device
        refuses.
        """
        packed = self.pack(name, fields)
        stream = torch._C._cuda_getCurrentRawStream(on.device.index) if on.is_cuda else None
        error = self._functions[name](stream, self.overlap, packed)
        if error:
            raise RuntimeError(f"cuda.{name}: {self._describe(error).decode()}")

    def pack(self, name: str, fields: Mapping[str, Tensor | int | float | None]) -> bytes:
        """The struct of a function's call. Raises TypeError as `call` does."""
        find, pack, names = self._fields[name]
        try:
            values = find(fields)
        except KeyError:
            raise TypeError(_mismatch(name, fields.keys(), names)) from None
        if len(fields) != len(names):
            raise TypeError(_mismatch(name, fields.keys(), names))
        try:
            return pack(*[value if value.__class__ is int else _number(value) for value in values])
        except struct.error as error:
            raise TypeError(f"cuda.{name}: {error}") from error


def _number(value: Tensor | int | float | None) -> int | float:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return 0 if value is None else value


def _mismatch(name: str, given: Set[str], wanted: Set[str]) -> str:
    wrong = [f"field {field} is missing" for field in sorted(wanted - given)]
    wrong += [f"there is no field {field}" for field in sorted(given - wanted)]
    return f"cuda.{name}: {', '.join(wrong)}"


def library_for(target: Target) -> CudaLibrary | None:
    """The installed library if the target is a GPU that it runs on."""
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


def native(
    op: str, run: Callable, supports: Callable[..., bool], *, label: str = "", reads_early: str = "",
    order: int = NATIVE, **more: object,
) -> Implementation:  # fmt: skip
    """A kernel of the library, where that is installed. `reads_early` is the argument that the kernel may read before
    the kernels ahead of it have ended, if nothing on the device writes it (Overlap.WEIGHTS)."""
    label = label or f"cuda.{op.removeprefix('aten.')}"
    bind = functools.partial(_bind, reads_early)
    # Looked up at each call: tests put another library in its place.
    return Implementation(
        op, label, "cuda", run, supports=supports, order=order, library=lambda target: library_for(target), bind=bind,
        **more,
    )  # fmt: skip


def _bind(
    reads_early: str, implementation: Implementation, library: CudaLibrary, call: OpCall, ours: None
) -> Implementation:
    is_kept = reads_early in call.kept
    return with_library(implementation, library.overlapping(Overlap.WEIGHTS) if is_kept else library, call, ours)


def has_one_dtype(x: Tensor, *rest: object) -> bool:
    """All tensors are of one dtype."""
    return x.dtype in DTYPES and all(t.dtype == x.dtype for t in rest if isinstance(t, Tensor))
