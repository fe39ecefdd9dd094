"""Fuses both rotations with the KV cache write.

    write_cache(k_cache, v_cache, rope(k, T...), v, slots); paged_attention(rope(q, T...), k_cache, v_cache, ...)
->
    paged_attention(rope_cache(k_cache, v_cache, q, k, v, T..., slots), k_cache, v_cache, ...)
"""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.graph.edit import find_place, insert_call
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import is_node

OPS = torch.ops.fuseline


def fuse_rope_cache(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    writes = {n.args[0]: n for n in graph.graph.nodes if n.target is OPS.write_cache.default}
    matches = 0
    for node in [n for n in graph.graph.nodes if n.target is OPS.paged_attention.default]:
        write = writes.get(node.args[1])
        if write is not None and _is_rotated_alike(node.args[0], write.args[2]):
            matches += _fuse(node, write)
    return PassResult(matches)


def _is_rotated_alike(q: fx.Node, k: fx.Node) -> bool:
    if not all(is_node(n) and n.target is OPS.rope.default and len(n.users) == 1 for n in (q, k)):
        return False
    return q.args[1:] == k.args[1:]


def _fuse(attention: fx.Node, write: fx.Node) -> bool:
    k_cache, v_cache, k, v, slots, *scales = write.args
    q = attention.args[0]
    cos, sin, rows, rotary_dim, layout = q.args[1:]
    args = (k_cache, v_cache, q.args[0], k.args[0], v, cos, sin, rows, slots, rotary_dim, layout, *scales)
    place = find_place(args, [write, q])
    if place is None:
        return False
    turned = insert_call(place, OPS.rope_cache.default, args, q, q.meta["val"])
    attention.replace_input_with(q, turned)
    write.graph.erase_node(write)
    return True
