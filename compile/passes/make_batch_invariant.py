"""Replaces ops whose kernels depend on the batch, on a GPU.

linear(x, weight, bias) -> linear_invariant(x, weight, bias)     cuBLASLt picks its kernel by the number of rows
experts(...)            -> experts_invariant(...)                tile height depends on the pairs per expert
paged_attention(...)    -> paged_attention_invariant(...)        decode kernels sum keys in another order than prefill

All other kernels of ours compute a row from that row alone.
"""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.graph.edit import replace
from fuseline.compile.graph.graph_pass import PassContext, PassResult

aten = torch.ops.aten
OPS = torch.ops.fuseline
INSTEAD = {
    OPS.experts.default: OPS.experts_invariant.default,
    OPS.paged_attention.default: OPS.paged_attention_invariant.default,
}


def make_batch_invariant(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    matches = 0
    for node in list(graph.graph.nodes):
        if node.target is aten.linear.default:
            x, weight, *bias = node.args
            args = (x, weight, bias[0] if bias else None)
            matches += replace(graph.graph, node, OPS.linear_invariant.default, args) is not None
        elif node.target in INSTEAD:
            matches += replace(graph.graph, node, INSTEAD[node.target], node.args) is not None
    return PassResult(matches, matches > 0)
