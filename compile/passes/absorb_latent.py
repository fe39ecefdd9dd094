"""Attention over latents instead of the heads that are expanded from them (multi-head latent attention, DeepSeek-V2).

    k_nope, v = split(transpose(view(linear(latent, W))))               # latent [1, 1, T, R], W [H * (N + E), R]
    attention(cat(q_nope, q_pe), cat(k_nope, expand(k_pe)), v)          # H heads of keys and values
->
    k = cat(latent, k_pe)                                               # one head, whose values are its first R numbers
    o = attention(cat(head_linear(q_nope, W's keys, turned), q_pe), k, k[..., :R])
    head_linear(o, W's values)

The cache then keeps R + P numbers of a token instead of H * (N + P + E). Prompts go the same way as single tokens: a
row's bits must not depend on how many others are computed with it. A weight of codes is dequantized as it is loaded.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, fx

from fuseline.compile.graph.edit import constant, insert_op, take_over
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import Call, Var, is_constant, is_node, match
from fuseline.compile.ops.library import named_arguments
from fuseline.compile.specs import WeightSource

aten = torch.ops.aten
OPS = torch.ops.fuseline


def _is_last(value: object) -> bool:
    return value in (-1, 3)


LAST = Var("last", _is_last)
VIEWED = Call((aten.view.default, aten.reshape.default), Call(OPS.linear.default, Var("latent"), Var("weight"), None))
SPLIT = Call(aten.split_with_sizes.default, Call(aten.transpose.int, VIEWED, 1, 2), Var("sizes"), LAST, name="split")
KEYS = Call(
    aten.cat.default,
    [Call(operator.getitem, SPLIT, 0), Call(aten.expand.default, Var("k_pe", is_node))],
    Var("dim", _is_last),
)
VALUES = Call(operator.getitem, Var("split"), 1)
QUERIES = Call(aten.cat.default, [Var("q_nope", is_node), Var("q_pe", is_node)], Var("dim", _is_last))


class Latent(NamedTuple):
    """What an attention layer's keys and values are expanded from."""

    latent: fx.Node
    k_pe: fx.Node
    weight: fx.Node
    num_heads: int
    nope_dim: int
    value_dim: int

    @property
    def rank(self) -> int:
        return self.weight.meta["val"].shape[1]

    @property
    def is_smaller(self) -> bool:
        """Whether the cache of latents is smaller than that of the heads."""
        pe_dim = self.k_pe.meta["val"].shape[-1]
        return self.rank + pe_dim < self.num_heads * (self.nope_dim + pe_dim + self.value_dim)


def absorb_latent(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    nodes = [node for node in graph.graph.nodes if node.target is OPS.attention.default]
    found = [(node, _latent_of(node)) for node in nodes]
    for node, latent in found:
        if latent is not None:
            _absorb(graph, node, latent)
    return PassResult(sum(latent is not None for _, latent in found))


def _latent_of(node: fx.Node) -> Latent | None:
    given = named_arguments(node)
    q, k, v = given["q"], given["k"], given["v"]
    found = None if given["slopes"] or given["chunk"] or given["relative"] else match(KEYS, k)
    if found is None or match(VALUES, v) is None or v.args[0] is not found["split"]:
        return None
    num_heads, weight, k_pe = k.meta["val"].shape[1], found["weight"], found["k_pe"]
    is_plain = is_constant(weight) and "fqn" in weight.meta and "weight" not in weight.meta
    is_shared = k_pe.meta["val"].ndim == 4 and k_pe.meta["val"].shape[1] == 1
    if not is_plain or not is_shared or q.meta["val"].shape[1] != num_heads or len(found["sizes"]) != 2:
        return None
    latent = Latent(found["latent"], k_pe, weight, num_heads, *found["sizes"])
    is_whole = weight.meta["val"].shape[0] == num_heads * sum(found["sizes"])
    return latent if is_whole and latent.is_smaller else None


def _absorb(graph: fx.GraphModule, node: fx.Node, of: Latent) -> None:
    call = partial(insert_op, node)
    into, out_of = (_weight(graph, of, *part) for part in ((True, 0, of.nope_dim), (False, of.nope_dim, of.value_dim)))
    found = match(QUERIES, node.args[0])
    if found is not None and found["q_nope"].meta["val"].shape[-1] == of.nope_dim:
        q_nope, q_pe = found["q_nope"], found["q_pe"]
    else:
        q_nope = call(aten.slice.Tensor, node.args[0], 3, 0, of.nope_dim)
        q_pe = call(aten.slice.Tensor, node.args[0], 3, of.nope_dim, 1 << 62)
    latent = of.latent if of.latent.meta["val"].ndim == 4 else call(aten.unsqueeze.default, of.latent, 1)
    absorbed = call(aten.transpose.int, call(OPS.head_linear.default, q_nope, into), 1, 2)
    q, k = call(aten.cat.default, [absorbed, q_pe], -1), call(aten.cat.default, [latent, of.k_pe], -1)
    seen = call(OPS.attention.default, q, k, call(aten.slice.Tensor, k, 3, 0, of.rank), *node.args[3:])
    expanded = call(OPS.head_linear.default, call(aten.transpose.int, seen, 1, 2), out_of)
    take_over([node], [expanded])


def _weight(graph: fx.GraphModule, of: Latent, is_turned: bool, begin: int, size: int) -> fx.Node:
    """Rows [begin, begin + size) of each head's, [H, R, size] if turned, else [H, size, R]."""
    like: Tensor = of.weight.meta["val"]
    shape = (of.num_heads, of.rank, size) if is_turned else (of.num_heads, size, of.rank)
    source = WeightSource((of.weight.meta["fqn"],), transpose=is_turned, heads=(of.num_heads, begin, begin + size))
    name = f"{of.weight.target}__{'keys' if is_turned else 'values'}"
    return constant(graph, name, like.new_empty(shape), weight=source)
