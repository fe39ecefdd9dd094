"""Selects the kernels that compute a graph on a GPU: every decision follows from their declarations.

Importing this needs no GPU and no triton; finding a kernel needs triton, which every torch for CUDA brings. Of the
kernels that take a call (registry.py) the first is the default; `-O3` measures which is fastest for which rows
(tuning/kernels.py) and leaves that in the node's meta["choices"]. Torch computes every op of its own.

A library has a trial before its first use: a small call of the same kind, whose results must be those of our kernel. A
library that fails is not used, with one line in the log.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from fuseline.compile.kernels.choice import default_choices, dispatcher
from fuseline.compile.kernels.registry import TORCH, Implementation, OpCall, implementations
from fuseline.compile.ops.library import CallShape, op_name
from fuseline.compile.ops.registry import op_of
from fuseline.compile.target import Target

logger = logging.getLogger(__name__)
SPACES = ("aten", "prims")
"""Namespaces of ops that torch computes."""
TOLERANCE = 2.0**-7
"""How far a trial's results may be from ours, relative and absolute: some roundings of bf16."""


def installed(target: Target) -> dict[str, object]:
    """The libraries whose kernels have a trial, by the kernel's label."""
    found = {}
    for each in implementations("cuda").values() if target.device == "cuda" else ():
        for one in each:
            if one.trial and one.label not in found and (library := one.library(target)) is not None:
                found[one.label] = library
    return found


class Kernels:
    """Finds the kernels of one executable; calls that are alike share trials and what is prepared for a step."""

    def __init__(self, target: Target, libraries: Mapping[str, object] | None = None) -> None:
        """`libraries` by label of the kernels that call them; None: those that are installed."""
        self.target = target
        self._libraries = installed(target) if libraries is None else libraries
        self._trusted: dict[tuple, list[Implementation]] = {}

    def find(self, node: fx.Node, constants: Collection[str] = ()) -> Implementation | None:
        """The kernel of a node, by default or by its choices; None for an op that nothing computes.

        `constants` are targets of get_attr nodes whose memory nothing on the device writes.
        """
        if getattr(node.target, "namespace", "") not in ("fuseline", *SPACES):
            name = getattr(node.target, "__name__", str(node.target))
            label = name if node.target is operator.getitem else f"python.{name}"
            return Implementation(name, label, "cuda", node.target)
        found = self.candidates(OpCall.of(node, self.target, constants))
        if not found:
            return None
        choices = node.meta.get("choices") or default_choices(found)
        return dispatcher(found, choices, _shape(node.target).size)

    def candidates(self, call: OpCall) -> list[Implementation]:
        """All that can compute a call, the default first, tunings last."""
        declared = [
            one for one in implementations("cuda").get(op_name(call.op), ())
            if (not one.isas or call.target.isa in one.isas) and one.supports(*call.args)
        ]  # fmt: skip
        ours = [bound for one in declared if not one.trial and (bound := _bound(one, call))]
        found = [*self._libraries_for(call, [one for one in declared if one.trial], ours), *ours]
        if call.op.namespace in SPACES:
            label = f"torch.{call.op._schema.name.rpartition('::')[2]}"
            found.append(Implementation(op_name(call.op), label, "cuda", call.op, order=TORCH))
        found = _distinct(sorted(found, key=lambda one: one.order))
        return [*found, *(tuned for one in found for tuned in one.with_tunings(call.args))]

    @property
    def has_prepared(self) -> bool:
        """Whether a step is to be told to `prepare` before it runs."""
        return any(one.prepare for each in self._trusted.values() for one in each)

    def prepare(self, host: Mapping[str, Tensor]) -> None:
        """Once a step, before its ops: `host` holds the step's inputs by placeholder name, on the host."""
        for each in self._trusted.values():
            for one in each:
                if one.prepare:
                    one.prepare(host)

    def _libraries_for(
        self, call: OpCall, declared: Sequence[Implementation], ours: Sequence[Implementation]
    ) -> list[Implementation]:
        """Those that are installed and passed their trial, bound for calls like this one."""
        declared = [one for one in declared if one.label in self._libraries]
        if not declared:
            return []
        key = (op_name(call.op), describe(call), *sorted(call.inputs.items()))
        if key not in self._trusted:
            tried = (self._tried(one, call, ours) for one in declared)
            self._trusted[key] = [one for one in tried if one]
        return self._trusted[key]

    def _tried(self, one: Implementation, call: OpCall, ours: Sequence[Implementation]) -> Implementation | None:
        own = next((other.run for other in ours if set(other.phases) & set(one.phases)), None)
        if own is None:
            return None
        bound = one.bind(one, self._libraries[one.label], call, own)
        args, host = one.trial(call, one.phases)
        try:
            if bound.prepare:
                bound.prepare(host)
            torch.testing.assert_close(bound.run(*args), own(*args), rtol=TOLERANCE, atol=TOLERANCE)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            logger.warning("%s is not used for %s: %s: %s", one.label, describe(call), type(error).__name__, first)
            return None
        return bound


def describe(call: OpCall) -> str:
    """Everything about a call that does not change from step to step."""
    names = [argument.name for argument in call.op._schema.arguments]
    return _shape(call.op).describe(names, call.args, [name in call.weights for name in names])


def _shape(op: object) -> CallShape:
    declared = op_of(op)
    return declared.calls if declared else CallShape()


def _bound(one: Implementation, call: OpCall) -> Implementation | None:
    """With its library, if it has one; None where that is not there."""
    if one.library is None:
        return one
    library = one.library(call.target)
    return None if library is None else one.bind(one, library, call, None)


def _distinct(found: Sequence[Implementation]) -> list[Implementation]:
    """The first of each label and phase, less what others hide of them."""
    taken = {(label, phase) for one in found for label in one.hides for phase in one.phases}
    left = []
    for one in found:
        phases = tuple(phase for phase in one.phases if (one.label, phase) not in taken)
        taken.update((one.label, phase) for phase in phases)
        left += [replace(one, phases=phases)] if phases else []
    return left
