"""Logits only for the rows that are sampled.

    logits[1, T, V] = tail(linear(norm(h[1, T, D]), lm_head))
->
    kept[1, R, D] = gather_rows(h[0], logits_rows)[None]; logits[1, R, V] = tail(linear(norm(kept), lm_head))

The cut is moved up as far as every op works on rows alone: scaling, soft-cap, casts, the final norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fuseline.compile.graph.edit import copy_meta, meta_int, placeholder
from fuseline.compile.graph.graph_pass import PassContext, PassResult

aten = torch.ops.aten


def keep_last_logits(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Raises ValueError when the graph does not end in a linear."""
    output = next(node for node in reversed(graph.graph.nodes) if node.op == "output")
    linear, tail = _final_linear(output.args[0])
    hidden = linear.args[0]
    rows = placeholder(graph.graph, "logits_rows", meta_int(2))
    kept_value = _with_rows(hidden.meta["val"])
    with graph.graph.inserting_before(linear):
        flat = graph.graph.call_function(aten.select.int, (hidden, 0, 0))
        copy_meta(hidden, flat, hidden.meta["val"][0])
        kept = graph.graph.call_function(torch.ops.fuseline.gather_rows.default, (flat, rows))
        copy_meta(hidden, kept, kept_value[0])
        batched = graph.graph.call_function(aten.unsqueeze.default, (kept, 0))
        copy_meta(hidden, batched, kept_value)
    linear.replace_input_with(hidden, batched)
    for node in (linear, *tail):
        node.meta["val"] = _with_rows(node.meta["val"])
    return PassResult(1, True)


def _final_linear(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The last linear and the row-wise ops behind it."""
    tail: list[fx.Node] = []
    while node.target is not aten.linear.default:
        inputs = [n for n in node.all_input_nodes if n.op == "call_function"]
        if len(inputs) != 1:
            raise ValueError(f"the logits do not come from one linear: {node.format_node()}")
        tail.append(node)
        node = inputs[0]
    return node, tail


def _with_rows(value: Tensor) -> Tensor:
    return torch.empty(1, 2, value.shape[2], dtype=value.dtype, device="meta")
