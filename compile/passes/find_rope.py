"""Raises rotary embedding to one op over tables.

    cos, sin = f(positions)                                    # some ops, once
    x * unsqueeze(cos, 1) + rotate_half(x) * unsqueeze(sin, 1) # per head tensor x[1, H, T, D]
->
    rope(x, cos_table, sin_table, rope_rows, rotary_dim, HALF)

Pairs of neighbours instead of halves are INTERLEAVED (Cohere, GLM-4), and SPLIT where the results lie in halves all the
same (DeepSeek). A rotation of the first R features only, cat(rope(x[..., :R]), x[..., R:]), becomes rope(x, ..., R).
The tables hold the captured f for all positions, computed in its own dtype, so a table row has the same bits as f.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fuseline.compile.graph.edit import (
    call_node,
    constant,
    find_place,
    insert_call,
    meta_int,
    placeholder,
    reached,
    replace,
    take_over,
)
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import Bindings, Call, Either, Var, is_node, is_number, match
from fuseline.compile.ops import codes

aten = torch.ops.aten
ROPE = torch.ops.fuseline.rope.default
VIEWS = (aten.reshape.default, aten.view.default)
END = 1 << 40

X = Var("x", is_node)


def _table(name: str) -> Either:
    """What heads are multiplied by, for each head the same; some repeat the numbers of half a line behind that."""
    half = Var(f"half_{name}", is_node)
    repeated = Call((aten.repeat_interleave.self_int, aten.slice.Tensor), half, name=name)
    lines = Call(aten.unsqueeze.default, Var(f"lines_{name}", is_node), Var("heads_at", lambda dim: dim in (1, 2)))
    return Either(Call(lines.targets, *lines.args, name=name), repeated)


COS, SIN = _table("cos"), _table("sin")


def _is_last(value: Any) -> bool:
    return value in (3, -1)


def _is_end(value: Any) -> bool:
    return is_number(value) and value > END


LOW = Call(aten.slice.Tensor, X, Var("d1", _is_last), 0, Var("half", is_number))
HIGH = Call(aten.slice.Tensor, X, Var("d2", _is_last), Var("half", is_number), Var("end", _is_end))
ROTATED = Call(aten.cat.default, [Call(aten.neg.default, HIGH), LOW], Var("d3", _is_last))
EVEN, ODD = (
    Call(aten.slice.Tensor, X, Var(f"d_{first}", _is_last), first, Var(f"end_{first}", _is_end), 2) for first in (0, 1)
)
PAIRED = Call(
    (aten.flatten.using_ints, *VIEWS),
    Call(aten.stack.default, [Call(aten.neg.default, ODD), EVEN], -1),
)


def _rotation(partner: Call) -> Call:
    return Call(
        aten.add.Tensor,
        Call(aten.mul.Tensor, X, COS, commutes=True),
        Call(aten.mul.Tensor, partner, SIN, commutes=True),
        commutes=True,
    )


ROTATE_HALF, ROTATE_PAIRS = _rotation(ROTATED), _rotation(PAIRED)

# DeepSeek-V2's product of complex numbers (real_pairs).
REAL, IMAGINARY = (Call(aten.select.int, Call(VIEWS, X), -1, part) for part in (0, 1))
TURN_COS = Call(aten.select.int, Var("turns", is_node), -1, 0, name="cos")
TURN_SIN = Call(aten.select.int, Var("turns", is_node), -1, 1, name="sin")
COMPLEX = Call(
    (aten.flatten.using_ints, *VIEWS),
    Call(
        aten.stack.default,
        [
            Call(aten.sub.Tensor, Call(aten.mul.Tensor, REAL, TURN_COS), Call(aten.mul.Tensor, IMAGINARY, TURN_SIN)),
            Call(aten.add.Tensor, Call(aten.mul.Tensor, REAL, TURN_SIN), Call(aten.mul.Tensor, IMAGINARY, TURN_COS)),
        ],
        -1,
    ),
)

# gpt-oss and DeepSeek compute the two halves separately, with tables of half the width.
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
            matches += _rotate_half(node, tables) or _rotate_pairs(node, tables) or _two_halves(node, tables)
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


def _rotate_pairs(node: fx.Node, tables: _Tables) -> bool:
    found = match(ROTATE_PAIRS, node) or match(COMPLEX, node)
    return found is not None and _rotate(node, found["x"], found, tables, codes.ROPE_INTERLEAVED)


def _two_halves(node: fx.Node, tables: _Tables) -> bool:
    found = match(TWO_HALVES, node)
    if found is None:
        return False
    first, second = found["first"], found["second"]
    even, odd = match(EVEN, first), match(ODD, second)
    if even and odd and even["x"] is odd["x"]:
        return _rotate(node, even["x"], found, tables, codes.ROPE_SPLIT)
    whole = first.args[0].args[0] if _is_half(first, 0) and _is_half(second, 1) else None
    if whole is None or first.args[0] is not second.args[0]:
        return False
    return _rotate(node, whole, found, tables)


def _rotate(node: fx.Node, x: fx.Node, found: Bindings, tables: _Tables, layout: int = codes.ROPE_HALF) -> bool:
    """Replaces the node by a rotation of all features of x."""
    value, lines = x.meta["val"], found["cos"].meta["val"]
    if value.ndim != 4 or lines.ndim != 4 or value.shape[-1] != node.meta["val"].shape[-1]:
        return False
    pair, rotary_dim = tables.lookup(found["cos"], found["sin"]), value.shape[-1]
    if pair is None or pair[0].meta["val"].shape[-1] not in (rotary_dim, rotary_dim // 2):
        return False
    if isinstance(lines.shape[1], int) and lines.shape[1] == 1:  # of x[1, H, T, D]
        return replace(node, ROPE, (x, *pair, tables.rows, rotary_dim, layout))
    return _rotate_turned(node, x, (*pair, tables.rows, rotary_dim, layout))


def _rotate_turned(node: fx.Node, x: fx.Node, rest: tuple) -> bool:
    """The same for x[1, T, H, D]."""
    place = find_place((x, *rest), [node])
    if place is None:
        return False
    turned = insert_call(place, aten.transpose.int, (x, 1, 2), node, x.meta["val"].transpose(1, 2))
    rotated = insert_call(place, ROPE, (turned, *rest), node, turned.meta["val"])
    take_over([node], [insert_call(place, aten.transpose.int, (rotated, 1, 2), node, node.meta["val"])])
    return True


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
        value = done[node]
        if value.ndim < 2 or value.numel() != positions.numel() * value.shape[-1]:
            return None
        return value.reshape(positions.shape[1], value.shape[-1]).contiguous()

