"""Constants in the layout of the kernels that read them, and logits in fp32.

linear(x, weight, bias)         -> linear_panels(x, weight as [ceil(N/16), K, 16], bias, N)
linear(x, computed weight, bias) -> aten.linear, which torch computes
experts(..., gate_up, down)     -> experts_panels(...), transposed weights turned
embedding(weight) of a packed weight -> embedding_panels: tied weights stay one copy
output logits                   -> convert to fp32
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from fuseline.compile.graph import edit
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.ops.linear import PANEL
from fuseline.compile.specs import WeightSource

aten = torch.ops.aten
OPS = torch.ops.fuseline


def choose_kernels(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    packer = _Packer(graph)
    matches = 0
    for target, rewrite in (
        (OPS.linear.default, packer.linear),
        (OPS.experts.default, packer.experts),
        (aten.embedding.default, packer.embedding),
    ):
        for node in [n for n in graph.graph.nodes if n.target is target]:
            matches += rewrite(node)
    widen_output(graph.graph)
    return PassResult(matches, True)


def is_constant(arg: object) -> bool:
    return isinstance(arg, fx.Node) and arg.op == "get_attr"


def source_of(node: fx.Node) -> WeightSource:
    return node.meta.get("weight") or WeightSource((node.meta["fqn"],))


class _Packer:
    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._packed: dict[tuple[str, ...], fx.Node] = {}

    def linear(self, node: fx.Node) -> bool:
        x, weight, bias = node.args
        if not is_constant(weight):
            self._replace(node, aten.linear.default, node.args)
            return False
        args = (x, self._pack(weight), bias, weight.meta["val"].shape[0])
        return self._replace(node, OPS.linear_panels.default, args)

    def experts(self, node: fx.Node) -> bool:
        x, ids, weights, gate_up, down, gate_up_bias, down_bias, act, transposed, alpha, limit = node.args
        num_hidden = down.meta["val"].shape[1 if transposed else 2]
        packed = (self._pack(gate_up, transposed), self._pack(down, transposed))
        args = (x, ids, weights, *packed, gate_up_bias, down_bias, act, num_hidden, alpha, limit)
        return self._replace(node, OPS.experts_panels.default, args)

    def embedding(self, node: fx.Node) -> bool:
        weight, ids = node.args[:2]
        packed = self._packed.get(source_of(weight).names) if is_constant(weight) else None
        if packed is None:
            return False
        return self._replace(node, OPS.embedding_panels.default, (ids, packed, weight.meta["val"].shape[0]))

    def _replace(self, node: fx.Node, target: object, args: tuple) -> bool:
        return edit.replace(self._graph.graph, node, target, args) is not None

    def _pack(self, weight: fx.Node, transposed: bool = False) -> fx.Node:
        source, value = source_of(weight), weight.meta["val"]
        if source.names in self._packed:
            return self._packed[source.names]
        rows, cols = (value.shape[-1], value.shape[-2]) if transposed else value.shape[-2:]
        like = torch.empty(*value.shape[:-2], -(-rows // PANEL), cols, PANEL, dtype=value.dtype, device="meta")
        packed = replace(source, layout="panels", transpose=source.transpose != bool(transposed))
        node = edit.constant(self._graph, f"{weight.target}__panels", like, weight=packed)
        self._packed[source.names] = node
        return node


def widen_output(graph: fx.Graph) -> bool:
    """Logits in fp32; False when they are so already."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    logits: fx.Node = output.args[0]
    if logits.meta["val"].dtype == torch.float32:
        return False
    convert = torch.ops.prims.convert_element_type.default
    wide = edit.insert_call(graph, output, convert, (logits, torch.float32), logits, logits.meta["val"].float())
    output.update_arg(0, wide)
    return True
