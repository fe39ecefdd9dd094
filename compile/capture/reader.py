"""Blocks of stored tensors through one small buffer: the file is never mapped, so pages of it never count as ours."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from math import lcm, prod
from pathlib import Path

import torch
from torch import Tensor

from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.checkpoint import CodedTensor
from fuseline.compile.capture.errors import LoadError, told_as
from fuseline.compile.capture.lazy_tensor import LazyTensor, TensorSlice
from fuseline.compile.ops.coded import Coded, dequantize

BLOCK_BYTES = 4 << 20
NOT_FINITE = {
    torch.float8_e4m3fn: (0x7F, 0x7F), torch.float8_e5m2: (0x7F, 0x7C), torch.float8_e8m0fnu: (0xFF, 0xFF),
}  # fmt: skip
"""Of numbers of 8 bits: which bits to look at, and from which value of them on a number is infinite or none."""


class Reader(ExitStack):
    """Reads slices block by block. A context manager: it owns the open files and the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, int] = {}
        self._buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        self._whole: tuple[CodedTensor, Coded] | None = None

    def blocks(self, part: TensorSlice) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield (start in the whole, values) of blocks that cover the slice; values are valid until the next."""
        if part.stored is None:
            yield part.start, part.view
            return
        read = self._decoded if isinstance(part.stored, CodedTensor) else self._read
        for start, view in cut(part.start, part.view, BLOCK_BYTES // part.view.element_size()):
            yield start, read(part, view)

    def value(self, lazy: LazyTensor) -> Tensor:
        """All of it, in memory, in the dtype that is stored."""
        if len(lazy.slices) == 1 and _is_range(lazy.slices[0]):
            return self._range(lazy.slices[0])
        out = torch.zeros(lazy.shape, dtype=lazy.slices[0].view.dtype)
        for part in lazy.slices:
            for start, block in self.blocks(part):
                write_box(out, block, start)
        return out

    def _range(self, part: TensorSlice) -> Tensor:
        """Bytes that follow each other, read into their place."""
        out = torch.empty(part.view.shape, dtype=part.view.dtype)
        self._fill(part, out.flatten(), part.view.storage_offset())
        return out

    def coded(self, stored: CodedTensor, begin: int, end: int) -> Coded | Tensor:
        """Rows (or experts) [begin, end) of a weight as codes and scales, or values where it has no layout."""
        if stored.published.cuts:
            return self._decode(stored, begin, end)
        if self._whole is None or self._whole[0] is not stored:
            self._whole = stored, self._decode(stored, 0, stored.published.shape[0])
        return rows_of(self._whole[1], begin, end)

    def _decode(self, stored: CodedTensor, begin: int, end: int) -> Coded | Tensor:
        published, cuts = stored.published, stored.published.cuts
        first = begin // lcm(*cuts.values()) * lcm(*cuts.values())
        tensors = {}
        for suffix, part in stored.parts.items():
            lazy, rows = lazy_tensor.whole(part), cuts.get(suffix)
            tensors[suffix] = self.value(lazy_tensor.narrow(lazy, 0, first // rows, -(-end // rows)) if rows else lazy)
        with told_as(LoadError, f"{stored.told} in {stored.path} cannot be decoded"):
            coded = rows_of(published.decode(tensors), begin - first, end - first)
        check_decoded(stored, coded, (end - begin, *published.shape[1:]))
        return coded

    def _decoded(self, part: TensorSlice, view: Tensor) -> Tensor:
        """Values of a view of a quantized weight, float32."""
        stored, at = part.stored, view.storage_offset()
        row = prod(stored.published.shape[1:])
        begin, end = at // row, (at + span_of(view) - 1) // row + 1
        coded = self.coded(stored, begin, end)
        values = coded if isinstance(coded, Tensor) else dequantize(coded, stored.published.layout)
        return values.flatten().as_strided(view.shape, view.stride(), at - begin * row)

    def _read(self, part: TensorSlice, view: Tensor) -> Tensor:
        span, size = span_of(view), view.element_size()
        if span * size > self._buffer.numel():  # a single row along every dim, still wider than a block
            self._buffer = torch.empty(span * size, dtype=torch.uint8)
        values = self._buffer[: span * size].view(view.dtype)
        self._fill(part, values, view.storage_offset())
        return values.as_strided(view.shape, view.stride())

    def _fill(self, part: TensorSlice, values: Tensor, first: int) -> None:
        """Read stored elements from `first` on into a vector. Raises LoadError."""
        at = part.stored.begin + first * values.element_size()
        self._read_bytes(part, memoryview(values.view(torch.uint8).numpy()), at)
        if not is_finite(values):
            name = f"{part.stored.name} in {part.stored.path}"
            raise LoadError(f"{name} has a value that is not finite: get the file again")

    def _read_bytes(self, part: TensorSlice, target: memoryview, at: int) -> None:
        if part.stored.fill is not None:
            try:
                return part.stored.fill(part.stored.path, target, at)
            except LoadError as error:
                raise LoadError(f"{part.stored.name}: {error}") from error
        file = self._open(part.stored.path)
        try:
            while target:
                got = os.preadv(file, [target], at)
                if got == 0:
                    raise LoadError(
                        f"{part.stored.name} in {part.stored.path} is cut off at byte {at}: get the file again"
                    )
                target, at = target[got:], at + got
        except OSError as error:
            raise LoadError(f"{part.stored.name} in {part.stored.path} cannot be read: {error.strerror}") from error

    def _open(self, path: Path) -> int:
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise LoadError(f"{path} cannot be opened: {error.strerror}") from error
            self.callback(os.close, self._files[path])
        return self._files[path]


def is_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite. One pass, at the speed of memory."""
    if values.dtype in NOT_FINITE:
        mask, least = NOT_FINITE[values.dtype]
        return int((values.view(torch.uint8) & mask).max()) < least
    if not values.dtype.is_floating_point or values.numel() == 0:
        return True
    return all(math.isfinite(end) for end in torch.aminmax(values))


def rows_of(coded: Coded | Tensor, begin: int, end: int) -> Coded | Tensor:
    """Outputs (or experts) [begin, end)."""
    return coded[begin:end] if isinstance(coded, Tensor) else coded.narrow(begin, end)


def check_decoded(stored: CodedTensor, coded: Coded | Tensor, shape: tuple[int, ...]) -> None:
    """Raises LoadError for codes or values of another shape, or numbers that are not finite."""
    layout, name = stored.published.layout, f"{stored.told} in {stored.path}"
    if isinstance(coded, Tensor):
        floats, what, fits = (coded,), "value", coded.shape == shape
    else:
        floats, what = (coded.scales, coded.zeros), "scale"
        fits = coded.codes.shape == shape and coded.scales.shape == (*shape[:-1], layout.num_groups(shape[-1]))
    if not fits:
        raise LoadError(f"{name}: its tensors do not fit together")
    if not all(part is None or is_finite(part) for part in floats):
        raise LoadError(f"{name} has a {what} that is not finite: get the file again")


def _is_range(part: TensorSlice) -> bool:
    """Whether the slice is all of a tensor, and bytes of a file one after the other."""
    is_plain = part.stored is not None and not isinstance(part.stored, CodedTensor)
    return is_plain and part.view.numel() > 0 and part.view.is_contiguous()


def write_box(target: Tensor, block: Tensor, start: tuple[int, ...]) -> None:
    """target[start : start + block.shape] = block, cast."""
    box_of(target, start, block.shape).copy_(block)


def box_of(target: Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """target[start : start + shape]."""
    return target[tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))]


def span_of(view: Tensor) -> int:
    """Elements of the storage from the first to the last of the view."""
    return 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))


def cut(start: tuple[int, ...], view: Tensor, most: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Boxes that span at most `most` elements of memory each, cut along the slowest dim first, with their start."""
    if view.numel() == 0:
        return
    dims = [dim for dim in range(view.ndim) if view.shape[dim] > 1]
    if not dims or span_of(view) <= most:
        yield start, view
        return
    slowest = max(dims, key=view.stride)
    rows = max(1, most // view.stride(slowest))
    for low in range(0, view.shape[slowest], rows):
        part = view.narrow(slowest, low, min(rows, view.shape[slowest] - low))
        yield from cut((*start[:slowest], start[slowest] + low, *start[slowest + 1 :]), part, most)
