"""Calls of native CPU kernels: found for a node, and made from the kernels' schemas (csrc/cpu/ops.def)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fuseline import _C  # noqa: F401  registers torch.ops.fuseline_cpu
from fuseline.compile.kernels.registry import Implementation, PlanCall, implementations
from fuseline.compile.ops.library import named_arguments, op_name


def plan_call(node: fx.Node, value: Callable[[object], object]) -> PlanCall | None:
    """The native call that computes a node, None where there is none. `value` gives a node's meta tensor."""
    found = implementations("cpu").get(op_name(node.target), ())
    if not found:
        return None

    def tensor(arg: fx.Node) -> object:
        """Sizes that a graph computes stay nodes: they are known at run time only."""
        known = value(arg)
        return known if isinstance(known, Tensor) else arg

    args, kwargs = fx.node.map_arg(node.args, tensor), fx.node.map_arg(node.kwargs, tensor)
    chosen = next((one for one in found if one.supports(*args, **kwargs)), None)
    return chosen and chosen.call(node)


def meta_value(arg: object) -> object:
    """The meta value of a node of a graph that passes work on; anything else as it is."""
    return arg.meta["val"] if isinstance(arg, fx.Node) else arg


def native(
    op: str, kernel: str = "", supports: Callable[..., bool] | None = None, **others: Callable[[fx.Node], object]
) -> Implementation:
    """A kernel whose arguments are those of the op that have the same names; `others` gives further ones of a node."""
    call = functools.partial(_call_by_name, kernel or op, others)
    more = {"supports": supports} if supports else {}
    return Implementation(op, kernel or op, "cpu", call=call, **more)


def _call_by_name(kernel: str, others: dict[str, Callable[[fx.Node], object]], node: fx.Node) -> PlanCall:
    given = named_arguments(node) | {name: find(node) for name, find in others.items()}
    own = _signature(kernel)
    return PlanCall(
        kernel, tuple(given.get(name) for name in own.inputs), tuple(_number(given[name]) for name in own.ints),
        tuple(float(given[name]) for name in own.floats), tuple(given[name] for name in own.written if name in given),
    )  # fmt: skip


def _number(value: object) -> object:
    return int(value) if isinstance(value, bool) else value


@dataclass(frozen=True)
class _Signature:
    """Names of a kernel's arguments. Written tensors that the op is not given are its outputs."""

    written: tuple[str, ...]
    inputs: tuple[str, ...]
    ints: tuple[str, ...]
    floats: tuple[str, ...]


@functools.cache
def _signature(kernel: str) -> _Signature:
    arguments = getattr(torch.ops.fuseline_cpu, kernel).default._schema.arguments
    written = tuple(a.name for a in arguments if a.alias_info is not None)
    of_type = {kind: tuple(a.name for a in arguments if str(a.type) == kind) for kind in ("int", "float")}
    inputs = tuple(a.name for a in arguments if "Tensor" in str(a.type) and a.alias_info is None)
    return _Signature(written, inputs, of_type["int"], of_type["float"])
