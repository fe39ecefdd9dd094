"""Feeds some positions by given embeddings in place of their tokens'.

    h[1, T, D] = embedding(weight, token_ids) ...                        what Transformers calls inputs_embeds
->
    h = index_copy(h, 1, embed_rows[E], embeds[E, D] in h's dtype)

Runs first: capture has marked the node, and other passes keep no marks.
"""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.graph.edit import insert_call, meta_int, placeholder
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import cast
from fuseline.compile.specs import FeedSpec

aten = torch.ops.aten


def feed_embeds(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Returns a FeedSpec. Raises ValueError if capture has not found the embeddings of the tokens."""
    node = next((node for node in graph.graph.nodes if node.meta.get("is_embedded")), None)
    if node is None:
        raise ValueError("the embeddings of the tokens are not found in its graph: no others can take their place")
    users, value, place = list(node.users), node.meta["val"], node.next
    rows = placeholder(graph.graph, "embed_rows", meta_int(2))
    embeds = placeholder(graph.graph, "embeds", torch.empty(2, value.shape[-1], device="meta"))
    like: torch.Tensor = embeds.meta["val"].to(value.dtype)
    given = insert_call(place, cast, (embeds, value.dtype), node, like)
    given = insert_call(place, aten.unsqueeze.default, (given, 0), node, like[None])
    fed = insert_call(place, aten.index_copy.default, (node, 1, rows, given), node, value)
    for user in users:
        user.replace_input_with(node, fed)
    return PassResult(1, specs=(FeedSpec(value.shape[-1]),))
