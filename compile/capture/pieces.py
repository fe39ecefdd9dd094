"""Lazy tensors: views of stored tensors and the slices of the whole that they fill.

Strides say where an element lies in its file, so joining, cutting and transposing are arithmetic on meta tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fuseline.compile.capture.checkpoint import StoredTensor


@dataclass(frozen=True)
class Piece:
    start: tuple[int, ...]
    """Start index of the slice in the whole tensor; its size is the view's shape."""
    view: Tensor
    """A meta view of the stored tensor, or a real tensor that was computed."""
    stored: StoredTensor | None = None


@dataclass(frozen=True)
class Unread:
    """Boxes that no piece covers are zeros."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def whole(stored: StoredTensor) -> Unread:
    return Unread(tuple(stored.meta.shape), (Piece((0,) * stored.meta.ndim, stored.meta, stored),))


def computed(value: Tensor) -> Unread:
    return Unread(tuple(value.shape), (Piece((0,) * value.ndim, value),))


def zeros(shape: Sequence[int]) -> Unread:
    return Unread(tuple(shape), ())


def concatenate(parts: Sequence[Unread], dim: int) -> Unread:
    """torch.cat. Raises ValueError if the other dims differ."""
    if len(parts) == 1:
        return parts[0]
    if len({part.shape[:dim] + part.shape[dim + 1 :] for part in parts}) > 1:
        raise ValueError(f"cannot join shapes {[list(part.shape) for part in parts]} along dim {dim}")
    pieces, at = [], 0
    for part in parts:
        for piece in part.pieces:
            start = piece.start[:dim] + (piece.start[dim] + at,) + piece.start[dim + 1 :]
            pieces.append(replace(piece, start=start))
        at += part.shape[dim]
    return Unread(parts[0].shape[:dim] + (at,) + parts[0].shape[dim + 1 :], tuple(pieces))


def stack(parts: Sequence[Unread], dim: int) -> Unread:
    """torch.stack."""
    return concatenate([unsqueeze(part, dim) for part in parts], dim)


def unsqueeze(whole: Unread, dim: int) -> Unread:
    pieces = tuple(
        replace(piece, start=piece.start[:dim] + (0,) + piece.start[dim:], view=piece.view.unsqueeze(dim))
        for piece in whole.pieces
    )
    return Unread(whole.shape[:dim] + (1,) + whole.shape[dim:], pieces)


def transpose(whole: Unread, first: int, second: int) -> Unread:
    """torch.transpose."""

    def swap(values: tuple[int, ...]) -> tuple[int, ...]:
        out = list(values)
        out[first], out[second] = out[second], out[first]
        return tuple(out)

    pieces = tuple(
        replace(piece, start=swap(piece.start), view=piece.view.transpose(first, second)) for piece in whole.pieces
    )
    return Unread(swap(whole.shape), pieces)


def split(whole: Unread, sizes: Sequence[int], dim: int) -> list[Unread]:
    """torch.split. Raises ValueError if the sizes do not add up."""
    if sum(sizes) != whole.shape[dim]:
        raise ValueError(f"cannot cut shape {list(whole.shape)} into {list(sizes)} along dim {dim}")
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [narrow(whole, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def narrow(whole: Unread, dim: int, begin: int, end: int) -> Unread:
    """Elements [begin, end) of one dim."""
    pieces = []
    for piece in whole.pieces:
        at, size = piece.start[dim], piece.view.shape[dim]
        low, high = max(begin, at), min(end, at + size)
        if low < high:
            start = piece.start[:dim] + (low - begin,) + piece.start[dim + 1 :]
            pieces.append(replace(piece, start=start, view=piece.view.narrow(dim, low - at, high - low)))
    return Unread(whole.shape[:dim] + (end - begin,) + whole.shape[dim + 1 :], tuple(pieces))
