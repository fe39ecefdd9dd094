"""Raises routers to one op.

  p = softmax(logits, f32); w, ids = topk(p, k); [w = w / sum(w)]; [w = cast(w, dtype)] -> route_topk(SOFTMAX_THEN_TOPK)
  l, ids = topk(logits, k); w = softmax(l)                                              -> route_topk(TOPK_THEN_SOFTMAX)

  s = sigmoid or softmax(logits, f32); c = s [+ bias]; [c = -inf outside the best groups]; ids = topk(c, k)
  w = s[ids]; [w = w / (sum(w) [+ eps])]; [w = w * scale]                               -> route_groups, in f32

A group is as good as the sum of its best experts, or as its best one. The weights keep the captured dtype: fp32 if the
model leaves them so.
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
from torch import fx

from fuseline.compile.graph.edit import replace_all
from fuseline.compile.graph.graph_pass import each_call
from fuseline.compile.graph.match import Call, Either, Var, cast, is_node, is_number, match
from fuseline.compile.ops import codes

aten = torch.ops.aten
DIVIDE = (aten.div.Tensor, aten.div_.Tensor)
MULTIPLY = (aten.mul.Tensor, aten.mul_.Tensor)


@each_call
def find_moe(node: fx.Node) -> bool:
    if node.target is not aten.topk.default or not _is_of_last(node) or node.args[0].meta["val"].ndim != 2:
        return False
    is_sorted = len(node.args) < 5 or bool(node.args[4])
    return (is_sorted and (_softmax_first(node) or _softmax_last(node))) or _among_groups(node)


def _is_of_last(node: fx.Node) -> bool:
    """Whether it is topk(x, k) over the last dim, largest first."""
    _, _, dim, largest = (*node.args, *(None, None, -1, True)[len(node.args) :])[:4]
    return dim in (-1, node.args[0].meta["val"].ndim - 1) and bool(largest)


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


BEST = Call(
    operator.getitem, Call(aten.topk.default, Var("grouped"), Var("group_best", is_number), name="best_experts"), 0
)  # fmt: skip
GROUP_SCORES = Either(
    Call(aten.sum.dim_IntList, BEST, [-1]), Call(operator.getitem, Call(aten.max.dim, Var("grouped"), -1), 0),
    Call(aten.amax.default, Var("grouped"), [-1]),
)  # fmt: skip
BEST_GROUPS = Call(
    operator.getitem, Call(aten.topk.default, Var("group_scores"), Var("top_groups", is_number), name="best_groups"), 1
)  # fmt: skip
CHOSEN = Call(
    (aten.scatter_.value, aten.scatter.value), Call(aten.zeros_like.default, Var("group_scores")), 1, BEST_GROUPS, 1,
)  # fmt: skip
FLAT = (aten.reshape.default, aten.view.default)
OUTSIDE = Call(
    aten.bitwise_not.default,
    Call(cast, Call(FLAT, Call(aten.expand.default, Call(aten.unsqueeze.default, CHOSEN, -1))), torch.bool),
)
MASKED = Call(aten.masked_fill.Scalar, Var("choice"), OUTSIDE, Var("masked", is_number))
SCORES = Either(
    Call(aten.sigmoid.default, Var("logits", is_node)),
    Call(aten.softmax.int, Var("logits", is_node), Var("dim", lambda d: d in (-1, 1))),
)
LAST_KEPT = (([-1], True), ([1], True))
"""Arguments of a sum over the last dim of a matrix, which stays as one of size 1."""
READERS = (*FLAT, aten.add.Tensor, aten.topk.default, aten.gather.default, aten.masked_fill.Scalar)


class Groups(NamedTuple):
    """Experts are chosen among those of the best `kept` of `count` groups, each as good as its `best` experts."""

    count: int = 1
    kept: int = 1
    best: int = 1


def _among_groups(topk: fx.Node) -> bool:
    choice, groups = _groups(topk)
    biased = match(Call(aten.add.Tensor, Var("scores", is_node), Var("bias", _is_line)), choice)
    scores, bias = (biased["scores"], biased["bias"]) if biased else (choice, None)
    found = match(SCORES, scores)
    if groups is None or found is None or found["logits"].meta["val"].dtype != torch.float32:
        return False
    if choice.kwargs or not all(user.target in READERS for user in scores.users):
        return False
    results = _chosen(topk, scores, bias is None)
    if results is None:
        return False
    if (normed := _normed(results[0])) is None:
        return False
    weights, epsilon = normed
    factor = _only_user(weights, MULTIPLY)
    scale = factor.args[1] if factor is not None and is_number(factor.args[1]) else 1.0
    weights = factor if factor is not None and is_number(factor.args[1]) else weights
    score = codes.ROUTE_SIGMOID if scores.target is aten.sigmoid.default else codes.ROUTE_SOFTMAX
    weighing = int(epsilon is not None), epsilon or 0.0, float(scale), weights.meta["val"].dtype
    args = (found["logits"], bias, topk.args[1], score, *groups, *weighing)
    return replace_all((weights, results[1]), torch.ops.fuseline.route_groups.default, args)


def _is_line(value: object) -> bool:
    return is_node(value) and value.meta["val"].ndim == 1 and value.meta["val"].dtype == torch.float32


def _groups(topk: fx.Node) -> tuple[fx.Node, Groups | None]:
    """What experts are chosen by, without the mask; no groups if experts are masked in another way."""
    masked = topk.args[0]
    if masked.target is not aten.masked_fill.Scalar:
        return masked, Groups()
    found = match(MASKED, masked)
    best = match(GROUP_SCORES, found["group_scores"]) if found else None
    grouped = match(Call(FLAT, Var("choice")), best["grouped"]) if best else None
    if grouped is None or grouped["choice"] is not found["choice"]:
        return masked, None
    if not all(_is_of_last(one) for one in (found["best_groups"], best.get("best_experts", found["best_groups"]))):
        return masked, None
    _, count, size = best["grouped"].meta["val"].shape
    groups = Groups(count, found["top_groups"], best.get("group_best", 1))
    # Zero is less than any score, but not than any sum of a score and a bias.
    is_least = found["masked"] == -math.inf or (found["masked"] == 0 and match(SCORES, found["choice"]) is not None)
    return found["choice"], groups if is_least and topk.args[1] <= groups.kept * size else None


def _chosen(topk: fx.Node, scores: fx.Node, is_plain: bool) -> tuple[fx.Node, fx.Node] | None:
    """Weights and ids: the scores of the chosen experts are gathered, or those that the top-k gives."""
    parts = {user.args[1]: user for user in topk.users if user.target is operator.getitem}
    if set(parts) == {0, 1} and is_plain:
        return parts[0], parts[1]
    if set(parts) != {1}:
        return None
    gathered = next((user for user in parts[1].users if user.target is aten.gather.default), None)
    if gathered is None or gathered.args[0] is not scores or gathered.args[1] not in (-1, 1):
        return None
    return gathered, parts[1]


def _normed(weights: fx.Node) -> tuple[fx.Node, float | None] | None:
    """The weights over their sum and what is added to it, or as they are if nothing sums them; None for other sums."""
    total = next((user for user in weights.users if user.target is aten.sum.dim_IntList), None)
    if total is None:
        return weights, None
    if len(weights.users) != 2 or len(total.users) != 1 or total.args[1:3] not in LAST_KEPT:
        return None
    plus = match(Call(aten.add.Tensor, Var("total"), Var("epsilon", is_number)), next(iter(total.users)))
    below = next(iter(total.users)) if plus else total
    ratio = next((user for user in weights.users if user.target in DIVIDE and user.args[1] is below), None)
    return None if ratio is None else (ratio, float(plus["epsilon"]) if plus else 0.0)


def _only_user(node: fx.Node, targets: tuple[object, ...]) -> fx.Node | None:
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and user.target in targets and user.args[0] is node else None
