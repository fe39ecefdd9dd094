"""Tensors as strided rows of their last dimension, for kernels that work row by row.

A kernel gets two strides a tensor: line r lies at r // inner * outer stride + r % inner * inner stride. That covers
what views of one buffer look like (heads of a joined product, [1, H, T, D] that is a transposed [T, H, D]); anything
else is copied first.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Lines:
    """`strides`: outer and inner, tensor by tensor."""

    num_lines: int
    inner: int
    strides: tuple[int, ...]

    @staticmethod
    def of(*tensors: Tensor) -> Lines:
        """Strided rows of tensors of one shape. Raises ValueError for a layout that two strides cannot say."""
        dims = _merged(tensors)
        if len(dims) > 2:
            raise ValueError(f"lines of {tuple(tensors[0].shape)} need more than two strides")
        dims = [(1, (0,) * len(tensors))] * (2 - len(dims)) + dims
        (outer, outer_strides), (inner, inner_strides) = dims
        pairs = zip(outer_strides, inner_strides, strict=True)
        return Lines(outer * inner, inner, tuple(stride for pair in pairs for stride in pair))


def lined(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as they are if two strides describe their rows, else contiguous copies."""
    dense = all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in tensors)
    return tensors if dense and len(_merged(tensors)) <= 2 else tuple(t.contiguous() for t in tensors)


def _merged(tensors: tuple[Tensor, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """(size, stride in each tensor) of the leading dimensions, neighbours that run on made one."""
    dims: list[tuple[int, tuple[int, ...]]] = []
    for d, size in enumerate(tensors[0].shape[:-1]):
        strides = tuple(t.stride(d) for t in tensors)
        if size == 1:
            continue
        if dims and all(s == size * stride for s, stride in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, strides)
        else:
            dims.append((size, strides))
    return dims


@triton.jit
def place_of(line, inner, outer_stride, inner_stride):
    return (line // inner).to(tl.int64) * outer_stride + (line % inner).to(tl.int64) * inner_stride


@triton.jit
def line_sums(x):
    """Sums of the rows of x [R, a power of two]: neighbours first, then pairs of them, and so on.

    tl.sum adds what a thread holds and then what threads have, so that its order, and with it the last bit, follows
    from how x lies in registers: from strides, alignment and what else the kernel loads. Two numbers have one sum.
    """
    SIZE: tl.constexpr = x.shape[1]
    if SIZE == 1:
        return tl.reshape(x, [x.shape[0]])
    else:
        return line_sums(tl.sum(tl.reshape(x, [x.shape[0], SIZE // 2, 2]), 2))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x as `dtype` holds it."""
    return x.to(dtype).to(tl.float32)
