"""Marks the regions that torch computes (compiled by inductor from level 2 on). Changes no node.

    linear -> [neg -> stack -> mul -> add] -> attention     only the stack has no kernel of ours; the rest joins it

A run of plain aten ops becomes one region if at least one of them has no kernel. Ops whose kernels round or sum in
their own way (sigmoid, exp, linears, norms) keep their kernels: a region rounds where eager torch rounds.
"""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.graph.edit import tensors_of
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import cast
from fuseline.compile.kernels.plan_call import meta_value, plan_call

aten = torch.ops.aten
EXACT = frozenset({
    aten.neg.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.relu.default,
    aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default, aten.cat.default, aten.reshape.default,
    aten.clone.default, aten.contiguous.default, cast,
})  # fmt: skip
"""Ops with a kernel whose results are rounded once: inductor computes the same bits."""

LIBRARY = frozenset({
    aten.topk.default, aten.sort.default, aten.linear.default, aten.matmul.default, aten.bmm.default,
    aten.scatter_.value, aten.scatter.value, aten.gather.default, aten.index_copy.default,
})  # fmt: skip
"""Inductor calls torch's own function for these: compiled regions with them measured slower (DeepSeek's router)."""


def cut_regions(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Matches are regions, numbered from 0; their nodes carry the number in meta["region"]."""
    runs: list[list[fx.Node]] = [[]]
    for node in graph.graph.nodes:
        if node.op != "call_function" or is_free(node):
            continue
        if can_join(node):
            runs[-1].append(node)
        elif runs[-1]:
            runs.append([])
    regions = [run for run in runs if any(needs_torch(node) for node in run)]
    for number, run in enumerate(regions):
        for node in run:
            node.meta["region"] = number
    return PassResult(len(regions))


def is_free(node: fx.Node) -> bool:
    """Sizes, views and tuple items: they cost nothing and do not end a run."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not tensors_of(node.meta.get("val")):
        return True
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def can_join(node: fx.Node) -> bool:
    is_square = node.target is aten.pow.Tensor_Scalar and node.args[1] == 2
    return node.target in EXACT or is_square or needs_torch(node)


def needs_torch(node: fx.Node) -> bool:
    if node.target in LIBRARY:
        return False
    is_plain = getattr(node.target, "namespace", "") in ("aten", "prims")
    return is_plain and node.target not in EXACT and plan_call(node, meta_value) is None
