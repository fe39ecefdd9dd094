"""Products with a weight as the op linear, whose weight is [out, in].

aten.linear(x, weight, bias)                             -> linear(x, weight, bias)
addmm(bias, x, weight) of a constant weight [in, out]    -> linear(x, weight^T, bias)     GPT-2's Conv1D
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fuseline.compile.graph.edit import constant, replace
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import is_constant
from fuseline.compile.specs import WeightSource

aten = torch.ops.aten
OPS = torch.ops.fuseline


def find_linear(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    matches = 0
    for node in list(graph.graph.nodes):
        args = None
        if node.target is aten.linear.default and not node.kwargs:
            args = (*node.args, None)[:3]
        elif node.target is aten.addmm.default and not node.kwargs:
            args = _conv1d_args(graph, node)
        matches += args is not None and replace(node, OPS.linear.default, args)
    return PassResult(matches)


def _conv1d_args(graph: fx.GraphModule, node: fx.Node) -> tuple | None:
    """The arguments of linear for an addmm whose weight is a parameter, else None."""
    bias, x, weight = node.args
    if not is_constant(weight) or "fqn" not in weight.meta:
        return None
    value: Tensor = weight.meta["val"]
    source = WeightSource((weight.meta["fqn"],), transpose=True)
    return x, constant(graph, f"{weight.target}__turned", value.t(), weight=source), bias
