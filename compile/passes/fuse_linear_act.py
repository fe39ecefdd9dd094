"""Fuses a joined gate and up projection with its activation: on a GPU one pass over the weights.

    gate, up = split(linear(x, [wg; wu], bias)); y = act_mul(gate, up, act)
->
    y = linear_act_mul(x, [wg; wu], bias, act)
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fuseline.compile.graph.edit import replace
from fuseline.compile.graph.graph_pass import each_call

aten = torch.ops.aten
OPS = torch.ops.fuseline


@each_call
def fuse_linear_act(node: fx.Node) -> bool:
    linear = _product_of(node) if node.target is OPS.act_mul.default else None
    return linear is not None and replace(node, OPS.linear_act_mul.default, (*linear.args, node.args[2]))


def _product_of(node: fx.Node) -> fx.Node | None:
    """Returns the linear whose two halves act_mul takes, gate first, if nothing else reads it."""
    gate, up, _ = node.args
    for k, part in enumerate((gate, up)):
        if part.target is not operator.getitem or part.args[1] != k or len(part.users) > 1:
            return None
    split = gate.args[0]
    if split is not up.args[0] or split.target is not aten.split_with_sizes.default or len(split.meta["val"]) != 2:
        return None
    linear, sizes = split.args[0], split.args[1]
    if linear.target is not OPS.linear.default or len(linear.users) > 1 or sizes[0] != sizes[1]:
        return None
    return linear
