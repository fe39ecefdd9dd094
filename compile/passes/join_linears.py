"""Joins linears that share their input and their consumer.

    q, k, v = linear(x, wq, bq), linear(x, wk), linear(x, wv)      # meet again in one attention
    gate, up = linear(x, wg), linear(x, wu)                        # meet again in one act_mul
->
    q, k, v = split(linear(x, [wq; wk; wv], [bq; 0; 0]))

A shared input is not enough: other readers of x (a router, a parallel branch) stay separate, and so do weights that are
stored in different layouts, or each with an order or a scale of inputs of its own.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, fx

from fuseline.compile.graph.edit import constant, find_place, insert_call, insert_parts, take_over
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import is_constant
from fuseline.compile.ops.coded import MIXED, parse_layout
from fuseline.compile.specs import WeightSource

aten = torch.ops.aten
OPS = torch.ops.fuseline
CONSUMERS = (OPS.attention.default, OPS.act_mul.default)
THROUGH = (
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, OPS.rms_norm.default,
    OPS.layer_norm.default, OPS.rope.default, aten.clamp.default,
)  # fmt: skip
MAX_STEPS = 8


def join_linears(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    groups: dict[tuple[fx.Node, fx.Node, str], list[fx.Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        if node.target is OPS.linear.default and _is_plain(node):
            consumer = _consumer(node)
            layout = ctx.layouts.get(node.args[1].meta["fqn"], "")
            if consumer is not None and _can_join(layout):
                groups[node.args[0], consumer, layout].append(node)
    matches = sum(_join(graph, group) for group in groups.values() if len(group) > 1)
    return PassResult(matches)


def _can_join(layout: str) -> bool:
    return layout in ("", MIXED) or parse_layout(layout).can_join


def _is_plain(node: fx.Node) -> bool:
    """Whether weight and bias are unmodified checkpoint tensors."""
    constants = [arg for arg in node.args[1:] if arg is not None]
    return all(is_constant(c) and "fqn" in c.meta and "weight" not in c.meta for c in constants)


def _consumer(node: fx.Node) -> fx.Node | None:
    """Returns the attention or gated product that consumes the result, through ops that keep features separate."""
    for _ in range(MAX_STEPS):
        users = [user for user in node.users if user.target is not aten.sym_size.int]
        if len(users) != 1:
            return None
        if users[0].target in CONSUMERS:
            return users[0]
        if users[0].target not in THROUGH:
            return None
        node = users[0]
    return None


def _join(graph: fx.GraphModule, group: list[fx.Node]) -> bool:
    place = find_place(group[0].args[0], group)
    if place is None:
        return False
    weights = [node.args[1] for node in group]
    sizes = [weight.meta["val"].shape[0] for weight in weights]
    name = "joined__" + "__".join(weight.target for weight in weights)
    like: Tensor = weights[0].meta["val"]
    source = WeightSource(tuple(weight.meta["fqn"] for weight in weights))
    args = [group[0].args[0], constant(graph, name, like.new_empty(sum(sizes), like.shape[1]), weight=source)]
    biases = [node.args[2] for node in group]
    has_bias = any(bias is not None for bias in biases)
    args.append(_joined_bias(graph, name, biases, sizes, like) if has_bias else None)
    first, results = group[0], tuple(node.meta["val"] for node in group)
    joined = results[0].new_empty(*results[0].shape[:-1], sum(sizes))
    product = insert_call(place, OPS.linear.default, tuple(args), first, joined)
    split = insert_call(place, aten.split_with_sizes.default, (product, sizes, -1), first, results)
    take_over(group, insert_parts(place, split, group))
    return True


def _joined_bias(
    graph: fx.GraphModule, name: str, biases: list[fx.Node | None], sizes: list[int], like: Tensor
) -> fx.Node:
    """Joins the biases; zeros replace missing ones."""
    names = tuple("" if bias is None else bias.meta["fqn"] for bias in biases)
    pads = tuple(size if bias is None else 0 for bias, size in zip(biases, sizes, strict=True))
    source = WeightSource(names, pads=pads if any(pads) else ())
    return constant(graph, f"{name}__bias", like.new_empty(sum(sizes)), weight=source)
