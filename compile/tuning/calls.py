"""Calls for measuring kernels: an op at a given number of rows, with the weights of its nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from fuseline.compile.ops.library import ROWS, StepSize, named_arguments
from fuseline.compile.ops.registry import op_of
from fuseline.compile.passes.fuse_persistent import Run
from fuseline.compile.tuning.timer import Arguments

MAX_TENSORS = 8
"""Maximum number of weights of one shape, read in turn."""


class CallMaker:
    """`weights` by get_attr target, on the device, or on the host if fetched in every pass."""

    def __init__(self, weights: Mapping[str, Tensor], device: str) -> None:
        self._weights = weights
        self._device = torch.device(device)

    def arguments(self, nodes: Sequence[fx.Node], phase: str, rows: int) -> Arguments:
        """Arguments for nodes that differ only in their weights."""
        # Weights not on the device may not fit in its free memory: then one is enough.
        chosen = [node for node in nodes if not self._is_away(node)][:MAX_TENSORS] or nodes[:1]
        if not op_of(nodes[0].target).weights:
            chosen = nodes[:1]
        calls = [self._call(node, StepSize(phase, rows, self._device)) for node in chosen]
        given = named_arguments(chosen[0]).values()
        values = {arg: value for arg, value in zip(given, calls[0], strict=True) if _is_input(arg)}
        host = {str(arg.target): value.cpu() for arg, value in values.items() if arg.op == "placeholder"}
        return Arguments(calls, host)

    def run_arguments(self, runs: Sequence[Run], rows: int) -> Arguments:
        """Inputs of alike runs, each behind its place in `runs`."""
        step = StepSize(ROWS, rows, self._device)
        return Arguments([(place, *self._inputs(run, step)) for place, run in enumerate(runs)])

    def _inputs(self, run: Run, step: StepSize) -> list[object]:
        """Each as the first op that reads it has it; numbers are those of rows."""
        made: dict[fx.Node, object] = {}
        for node in run.nodes:
            if node.name in run.steps:
                for arg, value in zip(named_arguments(node).values(), self._call(node, step), strict=True):
                    if _is_input(arg):
                        made.setdefault(arg, value)
        return [made.get(node, step.rows) for node in run.inputs]

    def _is_away(self, node: fx.Node) -> bool:
        constants = (arg for arg in node.all_input_nodes if arg.op == "get_attr")
        return any(self._weights[str(arg.target)].device.type != self._device.type for arg in constants)

    def _call(self, node: fx.Node, step: StepSize) -> tuple:
        named = named_arguments(node)
        inputs = {name: arg.meta["val"] for name, arg in named.items() if _is_input(arg)}
        fixed = {name: self._value(arg) for name, arg in named.items() if name not in inputs}
        made = fixed | dict(op_of(node.target).calls.make(inputs, fixed, step))
        return tuple(made[name] for name in named)

    def _value(self, arg: object) -> object:
        return self._weights[str(arg.target)].to(self._device) if isinstance(arg, fx.Node) else arg


def has_constants(node: fx.Node) -> bool:
    """Whether a call of the node can be synthesized: its weights are constants."""
    named = named_arguments(node)
    return not any(_is_input(named.get(name)) for name in op_of(node.target).weights)


def _is_input(arg: object) -> bool:
    return isinstance(arg, fx.Node) and arg.op != "get_attr"
