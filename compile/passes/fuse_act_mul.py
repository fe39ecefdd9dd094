"""Fuses a gate's activation and its product with the up projection.

act(gate) * up  ->  act_mul(gate, up, act)        act: silu, gelu, gelu_tanh, relu
"""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.graph.edit import replace
from fuseline.compile.graph.graph_pass import each_call
from fuseline.compile.graph.match import Call, Var, is_alike, is_node, match
from fuseline.compile.ops import codes

aten = torch.ops.aten
ACTIVATION = Call((aten.silu.default, aten.gelu.default, aten.relu.default), Var("gate", is_node), name="act")
PATTERN = Call(aten.mul.Tensor, ACTIVATION, Var("up", is_node), commutes=True)


@each_call
def fuse_act_mul(node: fx.Node) -> bool:
    found = match(PATTERN, node)
    if found is None or not is_alike(found["gate"], found["up"]) or len(found["act"].users) > 1:
        return False
    if any(found[name].meta["val"].stride(-1) != 1 for name in ("gate", "up")):  # kernels read rows
        return False
    args = (found["gate"], found["up"], codes.UNARY[_name(found["act"])])
    return replace(node, torch.ops.fuseline.act_mul.default, args)


def _name(node: fx.Node) -> str:
    if node.target is aten.gelu.default and node.kwargs.get("approximate") == "tanh":
        return "gelu_tanh"
    return str(node.target).split(".")[1]
