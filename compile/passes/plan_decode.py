"""Specializes the graph for decode-only steps: each sequence computes one token and needs its logits.

    gather_rows(x, logits_rows)   ->   x
"""

from __future__ import annotations

from torch import fx

from fuseline.compile.graph.edit import take_over
from fuseline.compile.graph.graph_pass import each_call
from fuseline.compile.ops.registry import op_of


@each_call
def plan_decode(node: fx.Node) -> bool:
    """Keeps the logits of every token, in order."""
    op = op_of(node.target)
    is_match = bool(op and op.picks_rows) and node.args[1].op == "placeholder" and node.args[1].target == "logits_rows"
    if is_match:
        take_over([node], [node.args[0]])
    return is_match
