"""Declaration of ops: one decorator registers a reference and a fake implementation as torch.ops.fuseline.<name>."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

TOKENS = (1, 16, 256)
"""Tokens per step: decoding one sequence, decoding sixteen, a prompt."""
LIBRARY = torch.library.Library("fuseline", "DEF")


@dataclass(frozen=True)
class Op:
    """An op of the vocabulary; the decorated function has it as `.op`."""

    name: str
    schema: str
    reference: Callable
    fake: Callable
    inputs: Callable[[Make], Iterable[tuple[Any, ...]]] | None
    """Argument tuples that cover the op; None if no kernel computes it."""
    workloads: Callable[[Make, ModelShape], Iterable[Workload]] | None
    """The op's work in a model of that shape, for `fuseline bench kernels`."""
    tolerance: float
    """Allowed difference between kernel and reference in float32, relative and absolute, in rounding steps at 1.

    In half precision at most one step: both round at the same places, where a float32 difference can flip one rounding.
    """


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, named as in config.json."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int = 4
    num_experts_per_tok: int = 2


@dataclass(frozen=True)
class Workload:
    """Arguments at real sizes, with the bytes and operations they cost."""

    label: str
    args: tuple[Any, ...]
    flops: int = 0
    num_bytes: int = 0
    """Bytes to be moved; 0: every tensor among arguments and results once."""


@dataclass(frozen=True)
class Make:
    """Makes the tensors of generated tests and benchmarks, the same in every run."""

    dtype: torch.dtype
    generator: torch.Generator
    tokens: tuple[int, ...] = TOKENS
    """Tokens per step for which workloads are made."""
    device: str = "cpu"

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.device, self.dtype)

    def fill(self, *shape: int) -> torch.Tensor:
        """A constant tensor: quick to make, and timed like any other."""
        return torch.full(shape, 0.01, dtype=self.dtype, device=self.device)

    def ids(self, below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, shape, generator=self.generator).to(self.device)

    def order(self, count: int) -> torch.Tensor:
        """A random permutation of 0 .. count - 1."""
        return torch.randperm(count, generator=self.generator).to(self.device)


def moved_bytes(op: Op, work: Workload) -> int:
    """Bytes the work must move: those it declares, or every argument and result once."""
    if work.num_bytes:
        return work.num_bytes
    results = op.fake(*(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in work.args))
    tensors = (*work.args, *(results if isinstance(results, tuple) else (results,)))
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors if isinstance(tensor, torch.Tensor))


def op(
    schema: str,
    fake: Callable,
    inputs: Callable[[Make], Iterable[tuple[Any, ...]]] | None = None,
    tolerance: float = 2.0,
    workloads: Callable[[Make, ModelShape], Iterable[Workload]] | None = None,
) -> Callable[[Callable], Callable]:
    """Registers the decorated reference under `schema`. `fake` computes result shapes, `inputs` yields test arguments,
    `workloads` benchmark arguments.
    """
    name = schema.split("(", 1)[0]

    def register(reference: Callable) -> Callable:
        LIBRARY.define(schema)
        LIBRARY.impl(name, reference, "CPU")
        torch.library.register_fake(f"fuseline::{name}", fake, lib=LIBRARY)
        reference.op = Op(name, schema, reference, fake, inputs, workloads, tolerance)
        return reference

    return register


def batch_invariant(of: Callable) -> Callable:
    """Registers a declared op also as NAME_invariant, whose kernels compute a row in one order for any batch."""
    found: Op = of.op
    schema = found.schema.replace(found.name, f"{found.name}_invariant", 1)
    return op(schema, found.fake, found.inputs, found.tolerance)(lambda *args: of(*args))
