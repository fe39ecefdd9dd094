"""Fuses both rotations with the KV cache write.

    write_cache(k_cache, v_cache, rope(k, T...), v, slots); paged_attention(rope(q, T...), k_cache, v_cache, ...)
->
    paged_attention(rope_cache(k_cache, v_cache, q, k, v, T..., slots), k_cache, v_cache, ...)

    write_latent(cache, cat(c, rope(k, T...)), slots); paged_latent_attention(cat(q_nope, rope(q, T...)), cache, ...)
->
    paged_latent_attention(rope_latent(cache, q_nope, q, c, k, T..., slots), cache, ...)
"""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.graph.edit import find_place, insert_call
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import Call, Var, is_node, match

OPS = torch.ops.fuseline
FUSED = {
    OPS.paged_attention.default: OPS.write_cache.default, OPS.paged_latent_attention.default: OPS.write_latent.default,
}  # fmt: skip
"""By attention the write of its caches."""
JOINED = Call(
    torch.ops.aten.cat.default, [Var("first", is_node), Var("turned", is_node)], Var("dim", lambda dim: dim in (-1, 3))
)


def fuse_rope_cache(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    writes = {n.args[0]: n for n in graph.graph.nodes if n.target in FUSED.values()}
    matches = 0
    for node in [n for n in graph.graph.nodes if n.target in FUSED]:
        write = writes.get(node.args[1])
        if write is not None and write.target is FUSED[node.target]:
            matches += (_fuse_latent if write.target is OPS.write_latent.default else _fuse)(node, write)
    return PassResult(matches)


def _is_rotated_alike(q: fx.Node, k: fx.Node) -> bool:
    if not all(is_node(n) and n.target is OPS.rope.default and len(n.users) == 1 for n in (q, k)):
        return False
    return q.args[1:] == k.args[1:]


def _fuse(attention: fx.Node, write: fx.Node) -> bool:
    k_cache, v_cache, k, v, slots, *scales = write.args
    q = attention.args[0]
    if not _is_rotated_alike(q, k):
        return False
    cos, sin, rows, rotary_dim, layout = q.args[1:]
    args = (k_cache, v_cache, q.args[0], k.args[0], v, cos, sin, rows, slots, rotary_dim, layout, *scales)
    return _replace(attention, write, OPS.rope_cache.default, args)


def _fuse_latent(attention: fx.Node, write: fx.Node) -> bool:
    cache, k, slots, *scales = write.args
    of_query, of_key = match(JOINED, attention.args[0]), match(JOINED, k)
    if of_query is None or of_key is None or not _is_rotated_alike(of_query["turned"], of_key["turned"]):
        return False
    if len(attention.args[0].users) != 1 or len(k.users) != 1:
        return False
    (q, *turning), (k_pe, *_) = of_query["turned"].args, of_key["turned"].args
    cos, sin, rows, *how = turning
    args = (cache, of_query["first"], q, of_key["first"], k_pe, cos, sin, rows, slots, *how, *scales)
    return _replace(attention, write, OPS.rope_latent.default, args)


def _replace(attention: fx.Node, write: fx.Node, target: object, args: tuple) -> bool:
    q = attention.args[0]
    place = find_place(args, [write, q])
    if place is None:
        return False
    turned = insert_call(place, target, args, q, q.meta["val"])
    attention.replace_input_with(q, turned)
    write.graph.erase_node(write)
    return True
