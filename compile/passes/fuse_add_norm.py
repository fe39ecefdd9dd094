"""Fuses a residual addition with the norm after it.

sum = x + residual; y = norm(sum, ...)   ->   y, sum = add_norm(x, residual, ...)
"""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.graph.edit import replace_all
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import is_node

aten = torch.ops.aten
OPS = torch.ops.fuseline
FUSED = {OPS.rms_norm.default: OPS.add_rms_norm.default, OPS.layer_norm.default: OPS.add_layer_norm.default}


def fuse_add_norm(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    matches = 0
    for node in list(graph.graph.nodes):
        if node.target in FUSED and _is_sum(node.args[0]):
            matches += _fuse(graph.graph, node, node.args[0])
    return PassResult(matches, matches > 0)


def _is_sum(node: fx.Node) -> bool:
    """Whether the node adds two tensors of the same shape and dtype."""
    if node.target is not aten.add.Tensor or node.kwargs or not all(is_node(arg) for arg in node.args):
        return False
    a, b = (arg.meta["val"] for arg in node.args)
    return a.shape == b.shape and a.dtype == b.dtype


def _fuse(graph: fx.Graph, norm: fx.Node, total: fx.Node) -> bool:
    return replace_all(graph, [norm, total], FUSED[norm.target], (*total.args, *norm.args[1:])) is not None
