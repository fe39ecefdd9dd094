"""Graph patterns: a tree of calls, matched from the last op back to its inputs.

rsqrt = Call(aten.rsqrt.default, Call(aten.add.Tensor, Var("mean"), Var("eps", is_number)))
found = match(rsqrt, node)          # {"mean": node, "eps": 1e-6} or None
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

cast = torch.ops.prims.convert_element_type.default
Bindings = dict[str, Any]


@dataclass(frozen=True)
class Var:
    """Matches anything that `accepts`; equal names must match equal values."""

    name: str
    accepts: Callable[[Any], bool] = lambda value: True


class Call:
    """Matches a call of one of `targets`; `args` are its leading arguments, in either order if it `commutes`."""

    def __init__(self, targets: Any, *args: Any, name: str = "", commutes: bool = False) -> None:
        self.targets = targets if isinstance(targets, tuple) else (targets,)
        self.args, self.name, self.commutes = args, name, commutes


class Either:
    """Matches what any of `patterns` matches; the first one that does binds the variables."""

    def __init__(self, *patterns: Any) -> None:
        self.patterns = patterns


def match(pattern: Any, node: Any) -> Bindings | None:
    """Returns the values of the variables, or None."""
    return _match(pattern, node, {})


def _match(pattern: Any, value: Any, bound: Bindings) -> Bindings | None:
    if isinstance(pattern, Either):
        found = (_match(one, value, bound) for one in pattern.patterns)
        return next((b for b in found if b is not None), None)
    if isinstance(pattern, Var) and pattern.name in bound:
        same = bound[pattern.name]
        return bound if same is value or (not isinstance(value, fx.Node) and same == value) else None
    if isinstance(pattern, Var):
        return {**bound, pattern.name: value} if pattern.accepts(value) else None
    if isinstance(pattern, Call):
        return _match_call(pattern, value, bound)
    if isinstance(pattern, (list, tuple)):
        is_alike = isinstance(value, (list, tuple)) and len(value) == len(pattern)
        return _match_all(tuple(pattern), tuple(value), bound) if is_alike else None
    return bound if not isinstance(value, fx.Node) and pattern == value else None


def _match_call(pattern: Call, value: Any, bound: Bindings) -> Bindings | None:
    if not is_node(value) or value.target not in pattern.targets or len(value.args) < len(pattern.args):
        return None
    if pattern.name:
        bound = {**bound, pattern.name: value}
    args = value.args[: len(pattern.args)]
    found = _match_all(pattern.args, args, bound)
    if found is None and pattern.commutes:
        found = _match_all(pattern.args, args[::-1], bound)
    return found


def _match_all(patterns: tuple, values: tuple, bound: Bindings) -> Bindings | None:
    current: Bindings | None = bound
    for pattern, value in zip(patterns, values, strict=True):
        current = _match(pattern, value, current) if current is not None else None
    return current


def is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_constant(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def is_alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors have the same shape and dtype."""
    a, b = one.meta["val"], other.meta["val"]
    return a.shape == b.shape and a.dtype == b.dtype


def maybe_cast(pattern: Any) -> Either:
    """Matches the pattern, or a cast of it."""
    return Either(Call(cast, pattern), pattern)
