"""Lazy tensors: views of stored tensors and the slices of the whole that they fill.

Strides say where an element lies in its file, so joining, cutting and transposing are arithmetic on meta tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fuseline.compile.capture.checkpoint import PairedRows, StoredTensor


@dataclass(frozen=True)
class TensorSlice:
    start: tuple[int, ...]
    """Start index of the slice in the whole tensor; its size is the view's shape."""
    view: Tensor
    """A meta view of the stored tensor, or a real tensor that was computed."""
    stored: StoredTensor | None = None


@dataclass(frozen=True)
class LazyTensor:
    """A tensor made of slices of stored ones; elements that none covers are zeros."""

    shape: tuple[int, ...]
    slices: tuple[TensorSlice, ...]


def whole(stored: StoredTensor) -> LazyTensor:
    if isinstance(stored, PairedRows):
        return _in_halves(stored)
    return LazyTensor(tuple(stored.meta.shape), (TensorSlice((0,) * stored.meta.ndim, stored.meta, stored),))


def _in_halves(stored: PairedRows) -> LazyTensor:
    """Half a head's rows are every second row of it."""
    meta, half = stored.meta, stored.head_dim // 2
    slices = []
    for at in range(0, meta.shape[0], half):
        head, is_second = divmod(at // half, 2)
        view = meta[head * stored.head_dim + is_second : (head + 1) * stored.head_dim : 2]
        slices.append(TensorSlice((at, *(0,) * (meta.ndim - 1)), view, stored))
    return LazyTensor(tuple(meta.shape), tuple(slices))


def computed(value: Tensor) -> LazyTensor:
    return LazyTensor(tuple(value.shape), (TensorSlice((0,) * value.ndim, value),))


def zeros(shape: Sequence[int]) -> LazyTensor:
    return LazyTensor(tuple(shape), ())


def concatenate(parts: Sequence[LazyTensor], dim: int) -> LazyTensor:
    """torch.cat. Raises ValueError if the other dims differ."""
    if len(parts) == 1:
        return parts[0]
    if len({part.shape[:dim] + part.shape[dim + 1 :] for part in parts}) > 1:
        raise ValueError(f"cannot join shapes {[list(part.shape) for part in parts]} along dim {dim}")
    slices, at = [], 0
    for part in parts:
        for one in part.slices:
            start = one.start[:dim] + (one.start[dim] + at,) + one.start[dim + 1 :]
            slices.append(replace(one, start=start))
        at += part.shape[dim]
    return LazyTensor(parts[0].shape[:dim] + (at,) + parts[0].shape[dim + 1 :], tuple(slices))


def stack(parts: Sequence[LazyTensor], dim: int) -> LazyTensor:
    """torch.stack."""
    return concatenate([unsqueeze(part, dim) for part in parts], dim)


def viewed(whole: LazyTensor, shape: Sequence[int]) -> LazyTensor:
    """torch.view of a tensor that is stored in one piece. Raises ValueError for another one."""
    if len(whole.slices) != 1 or tuple(whole.slices[0].view.shape) != whole.shape:
        raise ValueError(f"a tensor of shape {list(whole.shape)} that is stored in parts has no view {list(shape)}")
    (part,) = whole.slices
    return LazyTensor(tuple(shape), (replace(part, start=(0,) * len(shape), view=part.view.reshape(*shape)),))


def unsqueeze(whole: LazyTensor, dim: int) -> LazyTensor:
    slices = tuple(
        replace(part, start=part.start[:dim] + (0,) + part.start[dim:], view=part.view.unsqueeze(dim))
        for part in whole.slices
    )
    return LazyTensor(whole.shape[:dim] + (1,) + whole.shape[dim:], slices)


def transpose(whole: LazyTensor, first: int, second: int) -> LazyTensor:
    """torch.transpose."""

    def swap(values: tuple[int, ...]) -> tuple[int, ...]:
        out = list(values)
        out[first], out[second] = out[second], out[first]
        return tuple(out)

    slices = tuple(
        replace(part, start=swap(part.start), view=part.view.transpose(first, second)) for part in whole.slices
    )
    return LazyTensor(swap(whole.shape), slices)


def split(whole: LazyTensor, sizes: Sequence[int], dim: int) -> list[LazyTensor]:
    """torch.split. Raises ValueError if the sizes do not add up."""
    if sum(sizes) != whole.shape[dim]:
        raise ValueError(f"cannot cut shape {list(whole.shape)} into {list(sizes)} along dim {dim}")
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [narrow(whole, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def narrow(whole: LazyTensor, dim: int, begin: int, end: int) -> LazyTensor:
    """Elements [begin, end) of one dim."""
    slices = []
    for part in whole.slices:
        at, size = part.start[dim], part.view.shape[dim]
        low, high = max(begin, at), min(end, at + size)
        if low < high:
            start = part.start[:dim] + (low - begin,) + part.start[dim + 1 :]
            slices.append(replace(part, start=start, view=part.view.narrow(dim, low - at, high - low)))
    return LazyTensor(whole.shape[:dim] + (end - begin,) + whole.shape[dim + 1 :], tuple(slices))


def unbind(whole: LazyTensor) -> list[LazyTensor]:
    """torch.unbind along the first dim."""
    slices: list[list[TensorSlice]] = [[] for _ in range(whole.shape[0])]
    for part in whole.slices:
        for at in range(part.view.shape[0]):
            slices[part.start[0] + at].append(replace(part, start=part.start[1:], view=part.view[at]))
    return [LazyTensor(whole.shape[1:], tuple(parts)) for parts in slices]
