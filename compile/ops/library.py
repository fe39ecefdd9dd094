"""How an op of the vocabulary is declared: one decorator registers reference and fake as torch.ops.fuseline.<name>."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

LIBRARY = torch.library.Library("fuseline", "DEF")


@dataclass(frozen=True)
class Op:
    """One op of the vocabulary; `<reference>.op` of the decorated function."""

    name: str
    reference: Callable
    inputs: Callable[[Make], Iterable[tuple[Any, ...]]] | None
    """Argument tuples that cover the op; None for one that no kernel computes."""
    tolerance: float
    """How far a kernel may be from the reference in float32, relative and absolute, in rounding steps at 1.

    In half precision at most one step: the same roundings, of which a difference in float32 can flip one.
    """


@dataclass(frozen=True)
class Make:
    """Makes tensors for generated tests, the same on every run."""

    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def ids(self, below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, shape, generator=self.generator)

    def order(self, count: int) -> torch.Tensor:
        """0 .. count - 1, shuffled."""
        return torch.randperm(count, generator=self.generator)


def op(
    schema: str,
    fake: Callable,
    inputs: Callable[[Make], Iterable[tuple[Any, ...]]] | None = None,
    tolerance: float = 2.0,
) -> Callable[[Callable], Callable]:
    """Registers the decorated reference under `schema`; `fake` gives shapes, `inputs` the arguments for tests."""
    name = schema.split("(", 1)[0]

    def register(reference: Callable) -> Callable:
        LIBRARY.define(schema)
        LIBRARY.impl(name, reference, "CPU")
        torch.library.register_fake(f"fuseline::{name}", fake, lib=LIBRARY)
        reference.op = Op(name, reference, inputs, tolerance)
        return reference

    return register
