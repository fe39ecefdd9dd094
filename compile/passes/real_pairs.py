"""Computes complex numbers as pairs of real ones in one more dimension, the last: no kernel knows complex numbers.

    view_as_complex(x), view_as_real(z)   -> x, z
    polar(r, a)                           -> stack([r * cos(a), r * sin(a)], -1)
    (a, b) * (c, d)                       -> stack([a * c - b * d, a * d + b * c], -1)
    unsqueeze, slice, ... of z            -> the same of pairs

A graph with other uses of complex numbers stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from fuseline.compile.graph.edit import insert_op
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import is_number
from fuseline.compile.passes.clean import CASTS

aten = torch.ops.aten


def real_pairs(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    nodes = [node for node in graph.graph.nodes if _is_complex(node) or node.target is aten.view_as_real.default]
    if not all(_has_rule(node) and _is_real_in_end(node, nodes) for node in nodes):
        return PassResult(0)
    pairs: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        pairs[node] = RULES[node.target](node, pairs)
        if not _is_complex(node):
            node.replace_all_uses_with(pairs[node])
    return PassResult(len(nodes))


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def _has_rule(node: fx.Node) -> bool:
    rule = RULES.get(node.target)
    if rule is _product:
        return all(isinstance(factor, (fx.Node, int, float)) for factor in node.args)
    # A cast of a real number, or to another precision, is no view of pairs.
    is_cast = rule is _same and node.target not in VIEWS
    return rule is not None and not (is_cast and node.meta["val"].dtype != node.args[0].meta["val"].dtype)


def _is_real_in_end(node: fx.Node, nodes: list[fx.Node]) -> bool:
    return not _is_complex(node) or all(user in nodes for user in node.users)


Pairs = dict[fx.Node, fx.Node]


def _same(node: fx.Node, pairs: Pairs) -> fx.Node:
    """The pairs of the argument, or the argument that is pairs."""
    return pairs.get(node.args[0], node.args[0])


def _polar(node: fx.Node, pairs: Pairs) -> fx.Node:
    size, angle = node.args
    turned = [insert_op(node, turn, angle) for turn in (aten.cos.default, aten.sin.default)]
    return insert_op(node, aten.stack.default, [insert_op(node, aten.mul.Tensor, size, part) for part in turned], -1)


def _product(node: fx.Node, pairs: Pairs) -> fx.Node:
    left, right = node.args
    if left not in pairs:
        left, right = right, left
    if is_number(right):
        return insert_op(node, aten.mul.Tensor, pairs[left], right)
    if right not in pairs:
        return insert_op(node, aten.mul.Tensor, pairs[left], insert_op(node, aten.unsqueeze.default, right, -1))
    (a, b), (c, d) = ([insert_op(node, aten.select.int, pairs[of], -1, k) for k in (0, 1)] for of in (left, right))

    def times(x: fx.Node, y: fx.Node) -> fx.Node:
        return insert_op(node, aten.mul.Tensor, x, y)

    real = insert_op(node, aten.sub.Tensor, times(a, c), times(b, d))
    imaginary = insert_op(node, aten.add.Tensor, times(a, d), times(b, c))
    return insert_op(node, aten.stack.default, [real, imaginary], -1)


def _along_dim(node: fx.Node, pairs: Pairs) -> fx.Node:
    """An op whose second argument is a dim."""
    dim = node.args[1] if len(node.args) > 1 else 0
    return insert_op(node, node.target, pairs[node.args[0]], dim if dim >= 0 else dim - 1, *node.args[2:])


VIEWS = (aten.view_as_complex.default, aten.view_as_real.default)
RULES: dict[object, Callable[[fx.Node, Pairs], fx.Node]] = {
    **dict.fromkeys(VIEWS, _same), aten.polar.default: _polar, aten.mul.Tensor: _product,
    **dict.fromkeys((aten.unsqueeze.default, aten.slice.Tensor, aten.select.int), _along_dim),
    **dict.fromkeys((*CASTS, aten.contiguous.default, aten.clone.default), _same),
}  # fmt: skip
"""How the pairs of a complex result are computed, or the real result of one."""
