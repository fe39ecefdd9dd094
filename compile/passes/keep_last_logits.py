"""Computes logits only for the rows that are sampled.

    logits[1, T, V] = tail(linear(norm(h[1, T, D]), lm_head))
->
    kept[1, R, D] = gather_rows(h[0], logits_rows)[None]; logits[1, R, V] = tail(linear(norm(kept), lm_head))

The gather is moved up as far as every op works row by row: scaling, soft-cap, casts, the final norm with its sum.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fuseline.compile.graph.edit import insert_call, meta_int, placeholder, reached, results_of
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import cast

aten = torch.ops.aten
OPS = torch.ops.fuseline
LINEARS = (OPS.linear.default, aten.linear.default)
"""The second at level 0."""
BY_ROW = (OPS.rms_norm.default, OPS.layer_norm.default, cast)
SUMS = (OPS.add_rms_norm.default, OPS.add_layer_norm.default)


def keep_last_logits(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Raises ValueError if the graph does not end in a linear."""
    (logits,) = results_of(graph.graph)
    behind = final_linear(logits)
    first, num_inputs = _first_by_row(behind[-1], behind)
    rows = placeholder(graph.graph, "logits_rows", meta_int(2))
    kept: dict[fx.Node, fx.Node] = {}
    for whole in first.args[:num_inputs]:
        kept.setdefault(whole, _keep(first, whole, rows))
    first.args = (*(kept[whole] for whole in first.args[:num_inputs]), *first.args[num_inputs:])
    for node in behind:
        node.meta["val"] = fx.node.map_aggregate(node.meta["val"], _with_rows)
    return PassResult(1)


def final_linear(node: fx.Node) -> list[fx.Node]:
    """Returns the row-wise ops after the last linear, then that linear. Raises ValueError if there is not one."""
    nodes: list[fx.Node] = []
    while node.target not in LINEARS:
        inputs = [n for n in node.all_input_nodes if n.op == "call_function" and not _is_fixed(n)]
        if len(inputs) != 1:
            raise ValueError(f"the logits do not come from one linear: {node.format_node()}")
        nodes.append(node)
        node = inputs[0]
    return [*nodes, node]


def _is_fixed(node: fx.Node) -> bool:
    """Whether its value is made of weights alone (a scale of each token's logits)."""
    return all(earlier.op != "placeholder" for earlier in reached([node], lambda earlier: earlier.all_input_nodes))


def _first_by_row(node: fx.Node, behind: list[fx.Node]) -> tuple[fx.Node, int]:
    """Returns the first op that can use only the kept rows, and how many of its arguments have rows.

    Appends the ops between it and `node` to `behind`.
    """
    source = node.args[0]
    while source.target in BY_ROW and len(source.users) == 1:
        behind.append(source)
        node, source = source, source.args[0]
    total = source.args[0] if source.target is operator.getitem and len(source.users) == 1 else None
    if total is None or total.target not in SUMS or source.args[1] != 0:
        return node, 1
    if any(user is not source and user.users for user in total.users):
        return node, 1
    behind += [source, total]
    return total, 2


def _keep(before: fx.Node, whole: fx.Node, rows: fx.Node) -> fx.Node:
    value = whole.meta["val"]
    kept_value = _with_rows(value)
    flat = insert_call(before, aten.select.int, (whole, 0, 0), whole, value[0])
    kept = insert_call(before, OPS.gather_rows.default, (flat, rows), whole, kept_value[0])
    return insert_call(before, aten.unsqueeze.default, (kept, 0), whole, kept_value)


def _with_rows(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty(1, 2, value.shape[2], dtype=value.dtype, device="meta")
