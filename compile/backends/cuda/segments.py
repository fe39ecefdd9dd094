"""A lowered graph split into segments at the ops that are launched in every step.

    embedding .. rope_cache | attention | linear .. rope_cache | attention | .. | gather_rows .. logits
    segment                   split op    segment                split op           tail

The launch of attention depends on a step's sequences and lengths, or on a library's plan; ops after logits_rows run on
the rows that a step samples. All other ops depend on the number of tokens alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from fuseline.compile.backends.cuda.executable import CudaExecutable
from fuseline.compile.graph.edit import results_of
from fuseline.compile.kernels.registry import Implementation
from fuseline.compile.ops.registry import registry

ATTENTION_ELSEWHERE = ("unified_attention", "unified_attention_with_output")
"""Names of attention in other engines."""
CUT = ("placeholder", "get_attr", "call_function", "output")
Values = dict[str, Any]
"""Tensors, tuples of tensors, or sizes, by node name."""


@dataclass(frozen=True)
class Segment:
    """Consecutive ops. `run` takes the values of `inputs` and returns those of `outputs`, a tuple."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: fx.GraphModule


@dataclass(frozen=True)
class SplitOp:
    """One op launched in every step; nodes among its arguments stand for values."""

    name: str
    kernel: Implementation
    args: tuple[object, ...]
    is_attention: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(arg.name for arg in self.args if isinstance(arg, fx.Node))

    def with_values(self, values: Mapping[str, object]) -> tuple[object, ...]:
        """The arguments, with nodes replaced by their values where known."""
        return tuple(values.get(arg.name, arg) if isinstance(arg, fx.Node) else arg for arg in self.args)


@dataclass(frozen=True)
class Cuts:
    """Segments and split ops in execution order; `tail` computes the results."""

    parts: tuple[Segment | SplitOp, ...]
    tail: Segment

    def last_uses(self) -> dict[str, int]:
        """Index of the last part that reads each value, by name; the tail's index is the number of parts."""
        return {name: at for at, part in enumerate((*self.parts, self.tail)) for name in part.inputs}


def cut(executable: CudaExecutable, splitting_ops: Collection[str] = ()) -> Cuts | None:
    """None for a program with nodes other than kernel calls. Raises ValueError for an op that it lacks."""
    program = executable.program
    nodes = list(program.graph.nodes)
    if any(node.op not in CUT for node in nodes):
        return None
    names = {node.name: _op_name(node.target) for node in executable.kernels}
    attention = {op.name for op in registry().values() if op.reads_cache}
    kernels = {node.name: kernel for node, kernel in executable.kernels.items()}
    splitting = {name.replace("::", ".").rpartition(".")[2] for name in splitting_ops}.difference(ATTENTION_ELSEWHERE)
    if unknown := sorted(splitting - set(names.values())):
        raise ValueError(f"splitting_ops: the model has no op {unknown[0]!r}")
    splitting |= attention

    tail = _tail(nodes)
    make_segment = partial(_segment, program)
    parts: list[Segment | SplitOp] = []
    run: list[fx.Node] = []
    for node in (n for n in nodes if n.op == "call_function" and n not in tail):
        if names[node.name] not in splitting:
            run.append(node)
            continue
        # Always a segment first: it holds the memory for the op's results.
        parts += [make_segment(run)] if run or not parts else []
        args = tuple(_constant(program, arg) for arg in node.args)
        parts.append(SplitOp(node.name, kernels[node.name], args, names[node.name] in attention))
        run = []
    parts += [make_segment(run)] if run else []
    return Cuts(tuple(parts), make_segment([n for n in nodes if n in tail], results_of(program.graph)))


def _op_name(target: object) -> str:
    return target._schema.name.rpartition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


def _constant(program: fx.GraphModule, arg: object) -> object:
    """The tensor of a get_attr node; other values unchanged."""
    is_constant = isinstance(arg, fx.Node) and arg.op == "get_attr"
    return getattr(program, arg.target) if is_constant else arg


def _tail(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that depend on the requested rows."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "call_function" and any(
            arg.name == "logits_rows" or arg in found for arg in node.all_input_nodes
        ):
            found.add(node)
    return found


def _segment(program: fx.GraphModule, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node] | None = None) -> Segment:
    """Makes a segment; `outputs` default to the values that other parts read."""
    inside = set(nodes)
    if outputs is None:
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    read = dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in inside)
    read |= dict.fromkeys(node for node in outputs if node not in inside)
    graph, copies = fx.Graph(), {}
    inputs = [node for node in read if node.op != "get_attr"]
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in read:
        if node.op == "get_attr":
            copies[node] = graph.node_copy(node)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return Segment(
        tuple(node.name for node in inputs), tuple(node.name for node in outputs), fx.GraphModule(program, graph)
    )


def map_tensors(value: Any, change: Any) -> Any:
    """Maps the tensors of a value, through nested tuples."""
    return fx.node.map_aggregate(value, lambda item: change(item) if isinstance(item, torch.Tensor) else item)
