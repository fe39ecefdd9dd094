"""How an op of the vocabulary is declared: one decorator registers its reference as torch.ops.fuseline.<name>.

A declaration also states everything that the rest of the compiler must know of the op: which arguments are weights, how
the size of a call follows from its arguments, whether it is a matrix product. Nobody else keeps lists of ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

TOKENS = (1, 16, 256)
"""Tokens of a decode step of one sequence, of sixteen, and of a prompt."""
ROWS, DECODE, PREFILL = "rows", "decode", "prefill"
"""Phases: all calls of most ops; for attention, steps of one token a sequence and steps of more."""
LIBRARY = torch.library.Library("fuseline", "DEF")


@dataclass(frozen=True)
class StepSize:
    """The size of a call that is made up to measure kernels with."""

    phase: str
    rows: int
    device: torch.device

    def randn(self, like: Tensor, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(like.dtype)


def same_layout(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """torch.empty_like for fakes: dimensions in the order that they have in memory, without gaps.

    For a plain meta tensor torch itself would import a shape environment (sympy: 0.3 s of every start).
    """
    if type(x) is not Tensor or 0 in x.stride():
        return torch.empty_like(x, dtype=dtype)
    strides, step = [0] * x.dim(), 1
    for dim in sorted(range(x.dim()), key=x.stride, reverse=True)[::-1]:
        strides[dim] = step
        step *= max(x.shape[dim], 1)
    return torch.empty_strided(x.shape, strides, dtype=dtype or x.dtype, device=x.device)


def lines_size(x: Tensor, *_: object) -> tuple[str, int]:
    """(phase, rows) of a call whose first argument is x[..., K]."""
    return ROWS, x.numel() // x.shape[-1]


def make_lines(inputs: Mapping[str, Tensor], fixed: Mapping[str, object], step: StepSize) -> dict[str, Tensor]:
    """[1, rows, last size] for every input."""
    return {name: step.randn(x, 1, step.rows, x.shape[-1]) for name, x in inputs.items()}


def describe_arguments(names: Iterable[str], args: Iterable[object], weights: Iterable[bool]) -> str:
    """A weight by its shape, heads [1, H, T, D] by their number and size, other inputs by their last size."""
    return ", ".join(_text(*parts) for parts in zip(names, args, weights, strict=False))


def _text(name: str, arg: object, is_weight: bool) -> str:
    if not isinstance(arg, Tensor):
        return str(arg)
    shape, dtype = arg.shape, str(arg.dtype).removeprefix("torch.")
    if name.endswith("_cache"):
        shape = shape[1:]
    elif not is_weight:
        shape = (shape[1], shape[3]) if len(shape) == 4 else shape[-1:]
    return f"{'x'.join(str(int(size)) for size in shape)} {dtype}"


@dataclass(frozen=True)
class CallShape:
    """How calls of an op differ from step to step; kernels are chosen and measured by it."""

    size: Callable[..., tuple[str, int]] = lines_size
    """(phase, rows) from a call's arguments, without waiting for the device."""
    make: Callable[[Mapping[str, Tensor], Mapping[str, object], StepSize], Mapping[str, Tensor]] = make_lines
    """Random arguments of some size, by name, for the inputs (on meta); the fixed arguments are weights and numbers."""
    describe: Callable[[Iterable[str], Iterable[object], Iterable[bool]], str] = describe_arguments
    """Everything about a call that does not change from step to step, from names, values and whether each is a weight.
    """


def like_first(x: Tensor, *_: object) -> Tensor:
    """The fake of an op whose result has the shape and dtype of its first argument."""
    return same_layout(x)


@dataclass(frozen=True)
class Op:
    """An op of the vocabulary; the decorated function has it as `.op`."""

    name: str
    schema: str
    """Types of arguments and results, without the name."""
    reference: Callable
    fake: Callable = like_first
    """Gives results of the right shapes, on meta tensors."""
    inputs: Callable[[Make], Iterable[tuple[Any, ...]]] | None = None
    """Argument tuples that cover the op; None if no kernel computes it."""
    workloads: Callable[[Make, ModelShape], Iterable[Workload]] | None = None
    """Calls that a model of that shape makes, for `fuseline bench kernels`."""
    tolerance: float = 2.0
    """Allowed difference between kernel and reference in float32, relative and absolute, in rounding steps at 1.

    In half precision at most `half_tolerance`.
    """
    half_tolerance: float = 1.0
    """The same in half precision: both round at the same places, where a float32 difference can flip one rounding. More
    than 1 where some kernels round what they multiply."""
    weights: tuple[str, ...] = ()
    """Arguments that are parameters of the model. Kernels are only measured where they are constants of the graph."""
    is_product: bool = False
    """A matrix product with its weights: these can be kept on the host and fetched in every step."""
    sums: bool = True
    """Each output is a sum whose order a kernel chooses, so that another kernel may give other bits."""
    by_reference: bool = False
    """Torch computes it by its reference on a CPU where no kernel does."""
    picks_rows: bool = False
    """Gives the rows of its first argument that the second one names: all of them in order are the first argument."""
    invariant: str = ""
    """The op whose kernels sum a row in one order whatever the batch; empty where this op's kernels do."""
    calls: CallShape = field(default_factory=CallShape)
    state: Callable[..., tuple[tuple[int, ...], torch.dtype]] | None = None
    """Shape and dtype of the state that a recurrence keeps for a sequence, from a call's arguments; NAME_slots is the
    op that computes several sequences, whose states are in slots. None for any other op."""
    written: Callable[..., tuple[Tensor, ...]] | None = None
    """What a call writes to each of its caches, from its arguments; None for an op that writes none."""

    @functools.cached_property
    def target(self) -> torch._ops.OpOverload:
        """The function in graphs."""
        return getattr(torch.ops.fuseline, self.name).default

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        return tuple(argument.name for argument in self.target._schema.arguments)

    @property
    def caches(self) -> tuple[str, ...]:
        """Arguments that are KV caches: k_cache and v_cache, or latent_cache, whose keys hold the values."""
        return tuple(name for name in self.arguments if name.endswith("_cache"))

    @property
    def reads_cache(self) -> bool:
        return self.written is None and bool(self.caches)


def op_name(target: object) -> str:
    """The name under which ops and kernels are declared for a node's target: rms_norm, aten.add.Tensor.

    Empty for a target that is no op.
    """
    is_op = isinstance(target, torch._ops.OpOverload)
    return str(target).removeprefix("fuseline.").removesuffix(".default") if is_op else ""


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by their names in the op's schema, in its order; those left out have their defaults."""
    arguments = node.target._schema.arguments
    given = dict(zip((of.name for of in arguments), node.args, strict=False))
    defaults = {of.name: of.default_value for of in arguments if of.has_default_value()}
    return {of.name: given.get(of.name, defaults.get(of.name)) for of in arguments if of.name in given | defaults}


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


def op(writes: tuple[str, ...] = (), **facts: Any) -> Callable[[Callable], Callable]:
    """Registers the decorated reference; its name and annotations give the op's name and schema.

    `writes` names the arguments that it mutates; `facts` are further fields of Op.
    """

    def register(reference: Callable) -> Callable:
        schema = torch.library.infer_schema(reference, mutates_args=writes).replace("SymInt", "int")
        reference.op = _registered(Op(reference.__name__, schema, reference, **facts))
        return reference

    return register


def batch_invariant(of: Callable) -> Callable:
    """Registers a declared op also as NAME_invariant, whose kernels compute a row in one order for any batch."""

    def reference(*args: object) -> object:
        return of(*args)

    declared: Op = of.op
    reference.op = _registered(replace(declared, name=f"{declared.name}_invariant", workloads=None, invariant=""))
    return reference


def _registered(declared: Op) -> Op:
    LIBRARY.define(f"{declared.name}{declared.schema}")
    LIBRARY.impl(declared.name, declared.reference, "CPU")
    torch.library.register_fake(f"fuseline::{declared.name}", declared.fake, lib=LIBRARY)
    return declared
