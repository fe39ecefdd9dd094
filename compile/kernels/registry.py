"""All implementations of ops, found in the folders cpu/, cuda/, triton/ and external/: one file a family of ops.

A module there declares its kernels in a tuple `IMPLEMENTATIONS`; nothing else has to be touched. Only the folders of
the device that is asked for are imported: Triton's need triton, the CPU's need neither that nor a GPU.
"""

from __future__ import annotations

import functools
import importlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from fuseline.compile.ops.library import ROWS, named_arguments
from fuseline.compile.ops.registry import modules_of
from fuseline.compile.target import Target

FOLDERS = {"cpu": ("cpu",), "cuda": ("external", "cuda", "triton")}
ANY = 1 << 30
"""More rows than any call has."""
FIRST, NATIVE, TRITON, TORCH, LAST = 10, 20, 40, 50, 60
"""Orders: a library where it is the fastest, CUDA C++, Triton, torch's own, what is only used where measured faster."""


@dataclass(frozen=True)
class PlanCall:
    """A call of a native kernel in the CPU execution plan (csrc/cpu/ops.def), its arguments after the outputs.

    `inputs` are nodes or None; new output tensors come first in the call, then what it mutates.
    """

    kernel: str
    inputs: tuple[fx.Node | None, ...]
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()
    mutated: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Tuning:
    """Keyword arguments of `run` that -O3 measures beside its own choice; the label tells them apart."""

    label: str
    options: Mapping[str, object]
    phases: tuple[str, ...] = ()
    """Those of the implementation unless given."""


def tunings(option: str, values: Sequence[object], unit: str = "", phases: tuple[str, ...] = ()) -> tuple[Tuning, ...]:
    """A tuning for each value of one keyword argument."""
    return tuple(Tuning(f"{value}{unit}", {option: value}, phases) for value in values)


@dataclass(frozen=True)
class OpCall:
    """A call that kernels are looked for: its arguments (tensors perhaps on meta) and what else is known of them."""

    op: torch._ops.OpOverload
    args: tuple
    target: Target
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Names of the inputs of a step (caches are none) that arguments are, by argument."""
    weights: frozenset[str] = frozenset()
    """Arguments that are constants of the graph."""
    kept: frozenset[str] = frozenset()
    """Those of them whose memory nothing on the device writes."""

    @staticmethod
    def of(node: fx.Node, target: Target, constants: Collection[str] = ()) -> OpCall:
        """`constants` are targets of get_attr nodes whose memory nothing on the device writes."""
        args = fx.node.map_arg(node.args, lambda arg: arg.meta["val"])
        nodes = {name: arg for name, arg in named_arguments(node).items() if isinstance(arg, fx.Node)}
        steps = {name: arg for name, arg in nodes.items() if not name.endswith("_cache")}
        inputs = {name: str(arg.target) for name, arg in steps.items() if arg.op == "placeholder"}
        weights = {name: arg for name, arg in nodes.items() if arg.op == "get_attr"}
        kept = (name for name, arg in weights.items() if arg.target in constants)
        return OpCall(node.target, args, target, inputs, frozenset(weights), frozenset(kept))


def with_library(one: Implementation, library: object, call: OpCall, ours: Callable | None) -> Implementation:
    """`run` and `into` with the library as their first argument."""
    into = one.into and functools.partial(one.into, library)
    return replace(one, run=functools.partial(one.run, library), into=into)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op."""

    op: str
    """The name that ops.library.op_name gives: rms_norm, aten.add.Tensor."""
    label: str
    """Name of the kernel: cuda.rms_norm, flash_attn_3. Distinct within a phase of an op."""
    device: str
    """cpu or cuda."""
    run: Callable | None = None
    """For cuda: takes the op's arguments, after the library if there is one; gives its results, waits for nothing."""
    call: Callable[[fx.Node], PlanCall] | None = None
    """For cpu: the call in the execution plan that computes the node."""
    supports: Callable[..., bool] = lambda *args, **options: True
    """Whether it takes these arguments, tensors perhaps on meta; what changes from step to step is decided in `run`."""
    phases: tuple[str, ...] = (ROWS,)
    max_rows: int = ANY
    order: int = TRITON
    """The first that takes a call is the default."""
    tunings: Sequence[Tuning] | Callable[..., Sequence[Tuning]] = ()
    """Perhaps by the op's arguments."""
    into: Callable | None = None
    """The same as `run`, but writes the result to a tensor that comes first (behind the library)."""
    prepare: Callable[[Mapping[str, Tensor]], None] | None = None
    """Is given a step's inputs on the host, by placeholder name, before the step's ops, by the thread that runs it."""
    library: Callable[[Target], object | None] | None = None
    """Finds what `run` calls; where that is not installed the implementation is no candidate."""
    bind: Callable[[Implementation, object, OpCall, Callable | None], Implementation] = with_library
    """Gives the implementation its library, for one call; the last argument is our kernel for the phase."""
    isas: tuple[str, ...] = ()
    """Architectures it runs on; none given: all."""
    trial: Callable[[OpCall, tuple[str, ...]], tuple[tuple, Mapping[str, Tensor]]] | None = None
    """(arguments, host inputs) of a small call whose results must be those of our kernel before the first use."""
    hides: tuple[str, ...] = ()
    """Labels that are no candidates in its phases where this is one: they give other bits."""
    is_step: bool = False
    """Whether the persistent kernel computes the calls that it makes (kernels/cuda/persistent.py)."""

    def with_tunings(self, args: tuple) -> list[Implementation]:
        """One for each tuning of a phase that it has."""
        made = []
        for tuning in self.tunings(*args) if callable(self.tunings) else self.tunings:
            run, into = (f and functools.partial(f, **tuning.options) for f in (self.run, self.into))
            label = f"{self.label} {tuning.label}"
            if phases := tuple(phase for phase in self.phases if phase in (tuning.phases or self.phases)):
                made.append(replace(self, label=label, run=run, into=into, phases=phases, tunings=()))
        return made


@functools.cache
def implementations(device: str) -> dict[str, tuple[Implementation, ...]]:
    """By op, in their order. Raises ModuleNotFoundError for cuda without triton."""
    found: dict[str, list[Implementation]] = defaultdict(list)
    for folder in FOLDERS[device]:
        for module in modules_of(importlib.import_module(f"fuseline.compile.kernels.{folder}")):
            for implementation in getattr(module, "IMPLEMENTATIONS", ()):
                found[implementation.op].append(implementation)
    return {op: tuple(sorted(each, key=lambda one: one.order)) for op, each in found.items()}
