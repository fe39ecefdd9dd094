"""Values of a lowered graph whose sizes are known only at run time, read from two interpretations (sizes.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_iter

from fuseline.compile.backends.cpu_plan.sizes import Size, SizeError, evaluate, read
from fuseline.compile.graph.region import storage_key


@dataclass(frozen=True)
class View:
    """A strided tensor in a storage; strides and offset count elements."""

    storage: int
    """storage_key of the first interpretation's tensor."""
    dtype: torch.dtype
    sizes: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size


@dataclass(frozen=True)
class NonLinear:
    """A number that is not linear in the unknown sizes (T // 2, T > 5), computed once they are known."""


class Values:
    """The value of each node: a View, a Size, or a tuple of these. Evaluated lazily; raises SizeError."""

    def __init__(self, first: Mapping[fx.Node, Any], second: Mapping[fx.Node, Any]) -> None:
        """Takes the meta values of the two interpretations."""
        self._first, self._second = first, second
        self._known: dict[fx.Node, Any] = {}

    def __getitem__(self, node: fx.Node) -> Any:
        if node not in self._known:
            self._known[node] = symbolic(self._first[node], self._second[node])
        return self._known[node]


def symbolic(first: Any, second: Any) -> Any:
    """The symbolic value of two meta values. Raises SizeError for a tensor with a nonlinear size."""
    if isinstance(first, Tensor):
        sizes, strides = (
            tuple(read(a, b) for a, b in zip(one, other, strict=True))
            for one, other in ((first.shape, second.shape), (first.stride(), second.stride()))
        )
        offset = read(first.storage_offset(), second.storage_offset())
        return View(storage_key(first), first.dtype, sizes, strides, offset)
    if isinstance(first, (tuple, list)):
        if len(first) != len(second):
            raise SizeError("the number of results depends on the number of tokens")
        return tuple(symbolic(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, int) and not isinstance(first, bool):
        try:
            return read(first, second)
        except SizeError:
            return NonLinear()
    return first if first == second else NonLinear()


def views_of(value: Any) -> list[View]:
    return [item for item in tree_iter(value) if isinstance(item, View)]


def agrees(values: Values, node: fx.Node, small: Any, symbols: Sequence[int]) -> bool:
    """Whether the node's value for the sizes `symbols` has the shape of the meta value `small`."""
    try:
        return _is_alike(values[node], small, symbols)
    except SizeError:  # used only by torch, which computes the shape at run time
        return True


def _is_alike(value: Any, small: Any, symbols: Sequence[int]) -> bool:
    if isinstance(value, View):
        return [evaluate(size, symbols) for size in value.sizes] == list(small.shape)
    if isinstance(small, (tuple, list)):
        return len(value) == len(small) and all(_is_alike(a, b, symbols) for a, b in zip(value, small, strict=True))
    return isinstance(value, NonLinear) or evaluate(value, symbols) == small
