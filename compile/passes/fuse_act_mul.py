"""Fuses a gate's activation and its product with the up projection.

act(gate) * up  ->  act_mul(gate, up, act)        act: silu, gelu, gelu_tanh, relu
"""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.graph.edit import replace
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import Call, Var, is_node, match
from fuseline.compile.ops import codes

aten = torch.ops.aten
ACTIVATION = Call((aten.silu.default, aten.gelu.default, aten.relu.default), Var("gate", is_node), name="act")
PATTERN = Call(aten.mul.Tensor, ACTIVATION, Var("up", is_node), commutes=True)


def fuse_act_mul(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    matches = 0
    for node in list(graph.graph.nodes):
        found = match(PATTERN, node) if node.op == "call_function" else None
        if found is None or not _is_alike(found["gate"], found["up"]) or len(found["act"].users) > 1:
            continue
        act = codes.UNARY[_name(found["act"])]
        args = (found["gate"], found["up"], act)
        matches += replace(graph.graph, node, torch.ops.fuseline.act_mul.default, args) is not None
    return PassResult(matches, matches > 0)


def _is_alike(gate: fx.Node, up: fx.Node) -> bool:
    a, b = gate.meta["val"], up.meta["val"]
    return a.shape == b.shape and a.dtype == b.dtype


def _name(node: fx.Node) -> str:
    if node.target is aten.gelu.default and node.kwargs.get("approximate") == "tanh":
        return "gelu_tanh"
    return str(node.target).split(".")[1]
