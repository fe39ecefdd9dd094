"""Ops whose kernels depend on the batch give way to those that the ops declare as invariant, for a GPU.

linear(x, weight, bias) -> linear_invariant(x, weight, bias)     cuBLASLt picks its kernel by the number of rows
experts(...)            -> experts_invariant(...)                tiles are as high as there are pairs of an expert
paged_attention(...)    -> paged_attention_invariant(...)        few tokens of a sequence are summed in another order

All other kernels of ours compute a row from that row alone anyway.
"""

from __future__ import annotations

from torch import fx

from fuseline.compile.graph.edit import replace
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.ops.registry import op_of, registry


def make_batch_invariant(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    matches = 0
    for node in list(graph.graph.nodes):
        op = op_of(node.target)
        if op and op.invariant:
            instead = registry()[op.invariant].target
            num_needed = sum(not argument.has_default_value() for argument in instead._schema.arguments)
            args = (*node.args, *[None] * (num_needed - len(node.args)))
            matches += replace(graph.graph, node, instead, args) is not None
    return PassResult(matches, matches > 0)
