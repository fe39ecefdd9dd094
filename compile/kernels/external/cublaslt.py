"""Products by cuBLASLt with an algorithm of our choice: its first guess may not be the fastest, so -O3 measures more.

torch's `linear` takes what cuBLAS guesses. Here the guesses are asked for, best first, and a tuning names one by its
place in that list. The library is the one that torch has loaded, called by ctypes.

Matrices of cuBLASLt are stored by column: out[M, N] of ours is its N x M, weight[N, K] its transposed K x N.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.kernels.cuda.activation import act_mul
from fuseline.compile.kernels.cuda.library import CudaLibrary, library_for
from fuseline.compile.kernels.registry import LAST, Implementation, tunings
from fuseline.compile.target import Target

NUM_ALGORITHMS = 8
WORKSPACE = 32 << 20
"""Bytes of partial sums that an algorithm may ask for."""
ALIGNMENT = 16
"""Bytes; the library takes 256 for granted unless told."""
# Of cublas_api.h, library_types.h and cublasLt.h.
COMPUTE_32F, OP_T, DESC_TRANSA, PREF_WORKSPACE, PREF_ALIGNMENTS = 68, 1, 3, 1, range(5, 9)
R_32F, TYPES = 0, {torch.float16: 2, torch.bfloat16: 14}


class _Result(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algorithm", c_uint64 * 8), ("workspace", c_size_t), ("state", c_int), ("waves", c_float),
        ("reserved", c_int * 4),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Problem:
    """A product's description, with the algorithms for it, best guess first."""

    operation: c_void_p
    weight: c_void_p
    x: c_void_p
    out: c_void_p
    results: ctypes.Array


class CublasLt:
    """`library` has the functions of cublasLt.h."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._problems: dict[tuple, _Problem] = {}
        self._one, self._zero = c_float(1.0), c_float(0.0)
        self._handle = c_void_p()
        self._call("cublasLtCreate", byref(self._handle))

    def multiply(self, out: Tensor, x: Tensor, weight: Tensor, algorithm: int) -> None:
        """out[M, N] = x[M, K] times weight[N, K], half precision, float32 sums, by the guess in this place or, where
        there are fewer, the last. Raises RuntimeError for what the library refuses."""
        key = x.dtype, x.shape, x.stride(0), weight.shape, weight.stride(0)
        problem = self._problems.get(key)
        if problem is None:
            problem = self._problems[key] = self._describe(out, x, weight)
        result = problem.results[min(algorithm, len(problem.results) - 1)]
        # Of torch's allocator, so that a graph and each stream has its own.
        workspace = torch.empty(result.workspace, dtype=torch.uint8, device=x.device)
        stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else None
        self._call(
            "cublasLtMatmul", self._handle, problem.operation, byref(self._one), c_void_p(weight.data_ptr()),
            problem.weight, c_void_p(x.data_ptr()), problem.x, byref(self._zero), c_void_p(out.data_ptr()), problem.out,
            c_void_p(out.data_ptr()), problem.out, result.algorithm, c_void_p(workspace.data_ptr()),
            c_size_t(result.workspace), c_void_p(stream),
        )  # fmt: skip

    def _describe(self, out: Tensor, x: Tensor, weight: Tensor) -> _Problem:
        operation = self._made("cublasLtMatmulDescCreate", c_int(COMPUTE_32F), c_int(R_32F))
        self._set("cublasLtMatmulDescSetAttribute", operation, DESC_TRANSA, c_int(OP_T))
        layouts = [self._layout(each) for each in (weight, x, out)]
        preference = self._made("cublasLtMatmulPreferenceCreate")
        wanted = {PREF_WORKSPACE: c_size_t(WORKSPACE), **dict.fromkeys(PREF_ALIGNMENTS, c_uint32(ALIGNMENT))}
        for attribute, value in wanted.items():
            self._set("cublasLtMatmulPreferenceSetAttribute", preference, attribute, value)
        results, count = (_Result * NUM_ALGORITHMS)(), c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, operation, *layouts, layouts[-1], preference,
            c_int(NUM_ALGORITHMS), results, byref(count),
        )  # fmt: skip
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        if not count.value:
            raise RuntimeError(f"cublasLt has no algorithm for {tuple(x.shape)} times {tuple(weight.shape)}")
        return _Problem(operation, *layouts, (_Result * count.value)(*results[: count.value]))

    def _layout(self, matrix: Tensor) -> c_void_p:
        rows, columns = matrix.shape
        sizes = c_uint64(columns), c_uint64(rows), c_int64(matrix.stride(0))
        return self._made("cublasLtMatrixLayoutCreate", c_int(TYPES[matrix.dtype]), *sizes)

    def _made(self, name: str, *args: object) -> c_void_p:
        made = c_void_p()
        self._call(name, byref(made), *args)
        return made

    def _set(self, name: str, on: c_void_p, attribute: int, value: c_int | c_uint32 | c_size_t) -> None:
        self._call(name, on, c_int(attribute), byref(value), c_size_t(ctypes.sizeof(value)))

    def _call(self, name: str, *args: object) -> None:
        if status := getattr(self._library, name)(*args):
            raise RuntimeError(f"{name}: status {status}")


def linear(library: CublasLt, x: Tensor, weight: Tensor, bias: None = None, *, algorithm: int = 0) -> Tensor:
    """x[..., K] times weight[N, K] -> [..., N]."""
    rows = x.reshape(-1, x.shape[-1])
    is_aligned = not (rows.data_ptr() | weight.data_ptr()) % ALIGNMENT and rows.stride(0) % 8 == 0
    if not rows.numel() or rows.stride(1) != 1 or not is_aligned:
        return F.linear(x, weight)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    library.multiply(out.view(-1, weight.shape[0]), rows, weight, algorithm)
    return out


def linear_then_act_mul(
    libraries: tuple[CublasLt, CudaLibrary], x: Tensor, weight: Tensor, bias: None, act: int, *, algorithm: int = 0
) -> Tensor:
    """act(gate) * up of a joined product with weight [2I, K] -> [..., I], in two launches."""
    gate, up = linear(libraries[0], x, weight, algorithm=algorithm).chunk(2, -1)
    return act_mul(libraries[1], gate, up, act)


def _multiplies(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: object) -> bool:
    is_laid_out = weight.stride(1) == 1 and weight.stride(0) % 8 == 0 and weight.shape[1] % 8 == 0
    return x.dtype in TYPES and weight.dtype == x.dtype and bias is None and is_laid_out


def _find(target: Target) -> CublasLt | None:
    return _loaded() if target.device == "cuda" else None


def _find_both(target: Target) -> tuple[CublasLt, CudaLibrary] | None:
    products, ours = _find(target), library_for(target)
    return (products, ours) if products and ours else None


@functools.cache
def _loaded() -> CublasLt | None:
    """None where torch is linked otherwise."""
    major = (torch.version.cuda or "").partition(".")[0]
    try:
        return CublasLt(ctypes.CDLL(f"libcublasLt.so.{major}"))
    except (OSError, RuntimeError):
        return None


OTHERS = tunings("algorithm", range(1, NUM_ALGORITHMS))
IMPLEMENTATIONS = (
    Implementation(
        "linear", "cublaslt", "cuda", linear, supports=_multiplies, order=LAST, library=_find, tunings=OTHERS
    ),
    Implementation(
        "linear_act_mul", "cublaslt, cuda.act_mul", "cuda", linear_then_act_mul, supports=_multiplies, order=LAST,
        library=_find_both, tunings=OTHERS,
    ),
)  # fmt: skip
