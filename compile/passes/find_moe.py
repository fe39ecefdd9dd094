"""Raises routers made of a softmax and a top-k to one op.

  p = softmax(logits, f32); w, ids = topk(p, k); [w = w / sum(w)]; [w = cast(w, dtype)] -> route_topk(SOFTMAX_THEN_TOPK)
  l, ids = topk(logits, k); w = softmax(l)                                              -> route_topk(TOPK_THEN_SOFTMAX)

The weights keep the captured dtype: fp32 if the model leaves them so.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fuseline.compile.graph.edit import replace_all
from fuseline.compile.graph.graph_pass import each_call
from fuseline.compile.graph.match import Call, Var, cast, is_node, match
from fuseline.compile.ops import codes

aten = torch.ops.aten
DIVIDE = (aten.div.Tensor, aten.div_.Tensor)


@each_call
def find_moe(node: fx.Node) -> bool:
    is_router = node.target is aten.topk.default and _is_last_and_sorted(node)
    return is_router and (_softmax_first(node) or _softmax_last(node))


def _is_last_and_sorted(node: fx.Node) -> bool:
    """Whether it is topk(x, k) over the last dim of a matrix, largest first."""
    _, _, dim, largest, is_sorted = (*node.args, *(None, None, -1, True, True)[len(node.args) :])
    return dim in (-1, 1) and bool(largest and is_sorted) and node.args[0].meta["val"].ndim == 2


def _parts(topk: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    parts = {user.args[1]: user for user in topk.users if user.target is operator.getitem}
    return (parts[0], parts[1]) if len(parts) == len(topk.users) == 2 else None


def _softmax_first(topk: fx.Node) -> bool:
    logits, parts = Var("logits", is_node), _parts(topk)
    found = match(Call(aten.softmax.int, logits, Var("dim", lambda d: d in (-1, 1))), topk.args[0])
    if found is None or parts is None or len(topk.args[0].users) != 1:
        return False
    if topk.args[0].meta["val"].dtype != torch.float32:
        return False
    weights, ids = parts
    source = found["logits"]
    if source.target is cast and source.args[0].meta["val"].dtype != torch.float32:
        source = source.args[0]
    total = next((u for u in weights.users if u.target is aten.sum.dim_IntList), None)
    is_normed = total is not None
    if is_normed:
        ratio = next((u for u in weights.users if u.target in DIVIDE and u.args[1] is total), None)
        if ratio is None or len(weights.users) != 2 or len(total.users) != 1:
            return False
        weights = ratio
    return _route(topk, source, (weights, ids), codes.ROUTE_SOFTMAX_TOPK, is_normed)


def _softmax_last(topk: fx.Node) -> bool:
    parts = _parts(topk)
    if parts is None or len(parts[0].users) != 1:
        return False
    softmax = next(iter(parts[0].users))
    if softmax.target is not aten.softmax.int or softmax.args[1] not in (-1, 1):
        return False
    if softmax.meta["val"].dtype != topk.args[0].meta["val"].dtype:
        return False
    return _route(topk, topk.args[0], (softmax, parts[1]), codes.ROUTE_TOPK_SOFTMAX, False)


def _route(
    topk: fx.Node, logits: fx.Node, results: tuple[fx.Node, fx.Node], order: int, is_normed: bool
) -> bool:  # fmt: skip
    """Replaces the router; `results` are its weights and ids."""
    args = (logits, topk.args[1], order, int(is_normed), results[0].meta["val"].dtype)
    return replace_all(results, torch.ops.fuseline.route_topk.default, args)
