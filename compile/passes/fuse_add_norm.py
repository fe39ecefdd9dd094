"""A residual sum and the norm behind it as one op.

sum = x + residual; y = norm(sum, ...)   ->   y, sum = add_norm(x, residual, ...)
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fuseline.compile.graph.edit import copy_meta
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import is_node

aten = torch.ops.aten
OPS = torch.ops.fuseline
FUSED = {OPS.rms_norm.default: OPS.add_rms_norm.default, OPS.layer_norm.default: OPS.add_layer_norm.default}


def fuse_add_norm(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    matches = 0
    for node in list(graph.graph.nodes):
        if node.target in FUSED and _is_sum(node.args[0]):
            _fuse(graph.graph, node, node.args[0])
            matches += 1
    return PassResult(matches, matches > 0)


def _is_sum(node: fx.Node) -> bool:
    """A plain sum of two tensors of one shape and dtype."""
    if node.target is not aten.add.Tensor or node.kwargs or not all(is_node(arg) for arg in node.args):
        return False
    a, b = (arg.meta["val"] for arg in node.args)
    return a.shape == b.shape and a.dtype == b.dtype


def _fuse(graph: fx.Graph, norm: fx.Node, total: fx.Node) -> None:
    # The op goes where the sum was: everything that reads the sum comes behind it; constants are all at the top.
    with graph.inserting_before(total):
        both = graph.call_function(FUSED[norm.target], (*total.args, *norm.args[1:]))
        normed = graph.call_function(operator.getitem, (both, 0))
        summed = graph.call_function(operator.getitem, (both, 1))
    copy_meta(norm, both, (norm.meta["val"], total.meta["val"]))
    copy_meta(norm, normed, norm.meta["val"])
    copy_meta(total, summed, total.meta["val"])
    for old, new in ((norm, normed), (total, summed)):
        old.replace_all_uses_with(new)
        graph.erase_node(old)
