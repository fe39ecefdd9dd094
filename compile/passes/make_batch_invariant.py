"""Ops whose kernels depend on the batch give way to those that the ops declare as invariant, for a GPU.

linear(x, weight, bias) -> linear_invariant(x, weight, bias)     cuBLASLt picks its kernel by the number of rows
experts(...)            -> experts_invariant(...)                tile height depends on the pairs per expert
paged_attention(...)    -> paged_attention_invariant(...)        decode kernels sum keys in another order than prefill

All other kernels of ours compute a row from that row alone.
"""

from __future__ import annotations

from torch import fx

from fuseline.compile.graph.edit import replace
from fuseline.compile.graph.graph_pass import each_call
from fuseline.compile.ops.registry import op_of, registry


@each_call
def make_batch_invariant(node: fx.Node) -> bool:
    op = op_of(node.target)
    return bool(op and op.invariant) and replace(node, registry()[op.invariant].target, node.args)
