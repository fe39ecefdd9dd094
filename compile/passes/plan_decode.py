"""Specializes the graph for decode-only steps: each sequence computes one token and needs its logits.

    gather_rows(x, logits_rows)   ->   x
"""

from __future__ import annotations

from torch import fx

from fuseline.compile.graph.edit import take_over
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.ops.registry import op_of


def plan_decode(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Keeps the logits of every token, in order."""
    matches = 0
    for node in [node for node in graph.graph.nodes if (op := op_of(node.target)) and op.picks_rows]:
        x, rows = node.args
        if rows.op == "placeholder" and rows.target == "logits_rows":
            take_over(graph.graph, [node], [x])
            matches += 1
    return PassResult(matches, matches > 0)
