"""A single op: its native kernel called on real tensors, as a plan calls it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fuseline import _C
from fuseline.compile.backends.cpu_plan.plan import DTYPES
from fuseline.compile.kernels.plan_call import plan_call
from fuseline.compile.kernels.registry import PlanCall
from fuseline.compile.ops.library import Op

COPIED_BYTES = 256 << 10
"""Tensors from this size on are copied; smaller ones stay in CPU caches, as they do in a model."""
ROTATED_BYTES = 128 << 20
MAX_COPIES = 256


@dataclass(frozen=True)
class SingleCall:
    """The native call to which the op lowers with these arguments; tensors are outputs, mutated, inputs."""

    native: PlanCall
    tensors: tuple[Tensor | None, ...]
    num_outputs: int

    @property
    def num_bytes(self) -> int:
        """Total bytes, each tensor counted once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors if tensor is not None)


def single_call(op: Op, args: Sequence[object]) -> SingleCall:
    """Builds the native call. Raises ValueError for an op without a kernel."""
    graph, values = fx.Graph(), {}

    def node_of(arg: object) -> object:
        if not isinstance(arg, Tensor):
            return arg
        node = graph.placeholder(f"x{len(values)}")
        values[node] = arg
        node.meta["val"] = arg.to("meta")
        return node

    node = graph.call_function(op.target, tuple(map(node_of, args)))
    native = plan_call(node, lambda other: other.meta["val"])
    if native is None:
        raise ValueError(f"no kernel for {op.name}")
    results = op.target(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))
    results = () if results is None else (results,) if isinstance(results, Tensor) else tuple(results)
    outputs = [torch.empty_like(result, device="cpu") for result in results]
    inputs = [None if other is None else values[other] for other in native.inputs]
    mutated = [values[other] for other in native.mutated]
    return SingleCall(native, (*outputs, *mutated, *inputs), len(outputs))


def time_call(call: SingleCall, repeats: int) -> float:
    """Median seconds per call. Calls rotate over copies of large tensors, so each reads them from memory."""
    large = sum(t.nbytes for t in call.tensors if t is not None and t.nbytes >= COPIED_BYTES)
    num_copies = min(MAX_COPIES, -(-ROTATED_BYTES // large)) if large else 1
    plan, kept = _C.Plan(), []
    for _ in range(num_copies):
        tensors = [t.clone() if t is not None and t.nbytes >= COPIED_BYTES else t for t in call.tensors]
        kept.append(tensors)
        ids = [-1 if tensor is None else _add_tensor(plan, tensor) for tensor in tensors]
        plan.add_call(call.native.kernel, ids, list(call.native.ints), list(call.native.floats))
    return statistics.median(ns for _, _, ns in plan.profile([], -(-repeats // num_copies) + 1)) / 1e9


def _add_tensor(plan: _C.Plan, tensor: Tensor) -> int:
    slot = plan.add_slot(f"slot {plan.num_calls} {tensor.data_ptr()}")
    plan.set_slot(slot, tensor.data_ptr())
    return plan.add_tensor(slot, 0, DTYPES[tensor.dtype], list(tensor.shape), list(tensor.stride()))
