"""Fuses a residual addition with the norm after it.

sum = x + residual; y = norm(sum, ...)   ->   y, sum = add_norm(x, residual, ...)
"""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.graph.edit import replace_all
from fuseline.compile.graph.graph_pass import each_call
from fuseline.compile.graph.match import is_alike, is_node

aten = torch.ops.aten
OPS = torch.ops.fuseline
FUSED = {OPS.rms_norm.default: OPS.add_rms_norm.default, OPS.layer_norm.default: OPS.add_layer_norm.default}


@each_call
def fuse_add_norm(node: fx.Node) -> bool:
    if node.target not in FUSED or not _is_sum(node.args[0]):
        return False
    total = node.args[0]
    return replace_all([node, total], FUSED[node.target], (*total.args, *node.args[1:]))


def _is_sum(node: fx.Node) -> bool:
    """Whether the node adds two tensors of the same shape and dtype."""
    if node.target is not aten.add.Tensor or node.kwargs or not all(is_node(arg) for arg in node.args):
        return False
    return is_alike(*node.args)
