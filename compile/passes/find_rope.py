"""Raises rotary embedding to one op over tables.

    cos, sin = f(positions)                                    # some ops, once
    x * unsqueeze(cos, 1) + rotate_half(x) * unsqueeze(sin, 1) # per head tensor x[1, H, T, D]
->
    rope(x, cos_table, sin_table, rope_rows, rotary_dim, HALF)

A rotation of the first R features only, cat(rope(x[..., :R]), x[..., R:]), becomes rope(x, ..., R). The tables hold
the captured f for all positions, computed in its own dtype, so a table row has the same bits as f.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fuseline.compile.graph.edit import call_node, constant, meta_int, placeholder, reached, replace
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import Bindings, Call, Var, is_node, is_number, match
from fuseline.compile.ops import codes

aten = torch.ops.aten
ROPE = torch.ops.fuseline.rope.default
END = 1 << 40

X = Var("x", is_node)
COS = Call(aten.unsqueeze.default, Var("cos", is_node), 1)
SIN = Call(aten.unsqueeze.default, Var("sin", is_node), 1)


def _is_last(value: Any) -> bool:
    return value in (3, -1)


def _is_end(value: Any) -> bool:
    return is_number(value) and value > END


LOW = Call(aten.slice.Tensor, X, Var("d1", _is_last), 0, Var("half", is_number))
HIGH = Call(aten.slice.Tensor, X, Var("d2", _is_last), Var("half", is_number), Var("end", _is_end))
ROTATED = Call(aten.cat.default, [Call(aten.neg.default, HIGH), LOW], Var("d3", _is_last))
ROTATE_HALF = Call(
    aten.add.Tensor,
    Call(aten.mul.Tensor, X, COS, commutes=True),
    Call(aten.mul.Tensor, ROTATED, SIN, commutes=True),
    commutes=True,
)

# gpt-oss computes the two halves separately, with tables of half the width.
FIRST, SECOND = Var("first", is_node), Var("second", is_node)
TWO_HALVES = Call(
    aten.cat.default,
    [
        Call(aten.sub.Tensor, Call(aten.mul.Tensor, FIRST, COS), Call(aten.mul.Tensor, SECOND, SIN)),
        Call(aten.add.Tensor, Call(aten.mul.Tensor, SECOND, COS), Call(aten.mul.Tensor, FIRST, SIN)),
    ],
    Var("d3", _is_last),
)
PARTIAL = Call(
    aten.cat.default,
    [
        Call(ROPE, Call(aten.slice.Tensor, X, Var("d1", _is_last), 0, Var("rotary", is_number)), name="rope"),
        Call(aten.slice.Tensor, X, Var("d2", _is_last), Var("rotary", is_number), Var("end", _is_end)),
    ],
    Var("d3", _is_last),
)


def find_rope(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    tables = _Tables(graph, ctx)
    matches = 0
    for node in list(graph.graph.nodes):
        if node.op == "call_function":
            matches += _rotate_half(node, tables) or _two_halves(node, tables)
    for node in list(graph.graph.nodes):
        found = match(PARTIAL, node) if node.op == "call_function" else None
        if found is not None:
            replace(node, ROPE, (found["x"], *found["rope"].args[1:]))
    return PassResult(matches, constants=tables.values)


def _rotate_half(node: fx.Node, tables: _Tables) -> bool:
    found = match(ROTATE_HALF, node)
    if found is None or found["x"].meta["val"].shape[-1] != 2 * found["half"]:
        return False
    return _rotate(node, found["x"], found, tables)


def _two_halves(node: fx.Node, tables: _Tables) -> bool:
    found = match(TWO_HALVES, node)
    if found is None:
        return False
    first, second = found["first"], found["second"]
    whole = first.args[0].args[0] if _is_half(first, 0) and _is_half(second, 1) else None
    if whole is None or first.args[0] is not second.args[0]:
        return False
    return _rotate(node, whole, found, tables)


def _rotate(node: fx.Node, x: fx.Node, found: Bindings, tables: _Tables) -> bool:
    """Replaces the node by a rotation of all features of x."""
    pair = tables.lookup(found["cos"], found["sin"])
    if pair is None:
        return False
    return replace(node, ROPE, (x, *pair, tables.rows, x.meta["val"].shape[-1], codes.ROPE_HALF))


def _is_half(node: fx.Node, index: int) -> bool:
    """Whether the node is getitem `index` of a split of the last dim into two equal parts."""
    if node.op != "call_function" or len(node.args) != 2 or node.args[1] != index or not is_node(node.args[0]):
        return False
    split = node.args[0]
    if split.target is not aten.split_with_sizes.default or len(split.args) < 3 or not _is_last(split.args[2]):
        return False
    sizes = split.args[1]
    return len(sizes) == 2 and sizes[0] == sizes[1]


class _Tables:
    """Maps cos and sin nodes to constants with their values for every position."""

    def __init__(self, graph: fx.GraphModule, ctx: PassContext) -> None:
        self._graph, self._ctx = graph, ctx
        self._known: dict[fx.Node, fx.Node] = {}
        self.values: dict[str, Tensor] = {}
        self._inputs = {str(n.target): n for n in graph.graph.nodes if n.op == "placeholder"}

    @property
    def rows(self) -> fx.Node:
        return placeholder(self._graph.graph, "rope_rows", meta_int(2))

    def lookup(self, cos: fx.Node, sin: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Returns None if the nodes depend on more than positions."""
        pair = [self._table(node) for node in (cos, sin)]
        return None if None in pair else tuple(pair)

    def _table(self, node: fx.Node) -> fx.Node | None:
        if node not in self._known:
            value = self._evaluate(node)
            if value is None:
                return None
            name = f"rope_table_{len(self._known)}"
            self.values[name] = value
            self._known[node] = constant(self._graph, name, value, fqn=name)
        return self._known[node]

    def _evaluate(self, node: fx.Node) -> Tensor | None:
        """Returns None if the value depends on more than positions; of token ids it may use the shape."""
        known = {self._inputs["positions"], self._inputs["token_ids"]}
        steps = sorted(reached([node], lambda node: set(node.all_input_nodes) - known))
        first, second = (self._run(steps, node, token_id) for token_id in (0, 1))
        return first if first is not None and torch.equal(first, second) else None

    def _run(self, steps: list[fx.Node], node: fx.Node, token_id: int) -> Tensor | None:
        positions = torch.arange(self._ctx.num_rope_rows)[None]
        done: dict[fx.Node, Any] = {
            self._inputs["positions"]: positions,
            self._inputs["token_ids"]: torch.full_like(positions, token_id),
        }
        for step in steps:
            if step.op == "get_attr":
                if step.meta.get("fqn") not in self._ctx.constants:
                    return None
                done[step] = self._ctx.constants[step.meta["fqn"]]
            elif step.op == "call_function":
                done[step] = call_node(step, lambda arg: done[arg] if is_node(arg) else arg)
            else:
                return None
        return done[node][0].contiguous()

