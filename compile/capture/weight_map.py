"""Cached map of checkpoint tensors to parameters; building it takes the modules and Transformers' renamings.

    name in the model -> null (not stored), or [shape, [[start, stored name, dtype, shape, strides, offset], ...]]

Valid for checkpoints that store tensors of the same names, shapes and dtypes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fuseline.compile.capture.checkpoint import PairedRows, StoredTensor
from fuseline.compile.capture.lazy_tensor import LazyTensor, TensorSlice
from fuseline.compile.capture.reader import span_of

Found = dict[str, LazyTensor | None]


def fingerprint(stored: Mapping[str, StoredTensor]) -> str:
    """Return the fingerprint of everything that the map depends on besides the model."""
    rows = sorted(
        (name, tuple(t.meta.shape), t.meta.stride(), t.meta.storage_offset(), str(t.meta.dtype), _order_of(t))
        for name, t in stored.items()
    )
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def _order_of(stored: StoredTensor) -> int:
    """Rows of the heads whose rows lie in pairs; 0 for rows in the model's own order."""
    return stored.head_dim if isinstance(stored, PairedRows) else 0


def write_map(found: Found) -> bytes | None:
    """None when a tensor was computed: its values have no place in a map."""
    if any(part.stored is None for lazy in found.values() if lazy for part in lazy.slices):
        return None
    rows = {name: lazy and [lazy.shape, [_row(part) for part in lazy.slices]] for name, lazy in found.items()}
    return json.dumps(rows).encode()


def read_map(body: bytes, stored: Mapping[str, StoredTensor]) -> Found:
    """Raises ValueError, KeyError or TypeError when the body is no map of this checkpoint."""
    return {name: row and _lazy(row, stored) for name, row in json.loads(body).items()}


def _row(part: TensorSlice) -> list[Any]:
    return [part.start, part.stored.name, *_numbers(part.view)]


def _numbers(view: torch.Tensor) -> list[Any]:
    return [str(view.dtype).removeprefix("torch."), list(view.shape), list(view.stride()), view.storage_offset()]


def _lazy(row: list[Any], stored: Mapping[str, StoredTensor]) -> LazyTensor:
    shape, rows = row
    return LazyTensor(tuple(shape), tuple(_slice(stored, *values) for values in rows))


def _slice(
    stored: Mapping[str, StoredTensor], start: list[int], name: str, dtype: str,
    shape: list[int], strides: list[int], offset: int,
) -> TensorSlice:  # fmt: skip
    whole = stored[name]
    if _numbers(whole.meta)[0] != dtype:
        raise ValueError(f"{name} is not of type {dtype}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    inside = whole.meta.storage_offset() <= offset and last < whole.meta.storage_offset() + span_of(whole.meta)
    if not inside:
        raise ValueError(f"{name} is smaller")
    return TensorSlice(tuple(start), whole.meta.as_strided(shape, strides, offset), whole)


class RememberedWeights:
    """Map name -> lazy tensor, None if it is not stored; calls `resolve` only for names not in the map.

    Any thread may ask.
    """

    def __init__(self, found: Found | None, resolve: Callable[[], Mapping[str, LazyTensor]]) -> None:
        self.is_new = found is None
        self.found: Found = found or {}
        self._resolve = functools.cache(resolve)
        self._lock = threading.Lock()

    def get(self, name: str) -> LazyTensor | None:
        with self._lock:
            if name not in self.found:
                self.is_new, resolved = True, self._resolve()
                self.found[name] = resolved[name] if name in resolved else None
            return self.found[name]
