"""Weights in the storage format that the target's kernels read (compile/formats). On a CPU, panels:

linear(x, weight, bias)              -> linear_panels(x, weight as [ceil(N/16), K, 16], bias, N)
experts(..., gate_up, down)          -> experts_panels(...), transposed weights turned
embedding(weight) of a packed weight -> embedding_panels: tied weights stay one copy
linear(x, weight of codes, bias)     -> linear_codes(...), the layout being the checkpoint's or that of --quantization
linear(x, computed weight, bias)     -> aten.linear, which torch computes
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from fuseline.compile.formats.format import Format
from fuseline.compile.formats.registry import format_named, formats_for
from fuseline.compile.graph import edit
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import is_constant

aten = torch.ops.aten
OPS = torch.ops.fuseline


def pack_weights(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    packer = _Packer(graph)
    forms = formats_for(ctx.config, ctx.target)
    matches = 0
    for target in (OPS.linear.default, OPS.experts.default):
        plain = next((form for form in forms if target in form.readers), None)
        for node in [n for n in graph.graph.nodes if n.target is target and plain]:
            if target is OPS.linear.default and not is_constant(node.args[1]):
                edit.replace(node, aten.linear.default, node.args)
            else:
                matches += packer.replace(node, _form_of_codes(node, ctx) or plain)
    for node in [n for n in graph.graph.nodes if n.target is aten.embedding.default and is_constant(n.args[0])]:
        form = packer.format_of(node.args[0])
        matches += form is not None and node.target in form.readers and packer.replace(node, form)
    return PassResult(matches)


def _form_of_codes(node: fx.Node, ctx: PassContext) -> Format | None:
    """The format of a linear's weight, if that is made of codes of one layout."""
    weight = node.args[1]
    if node.target is not OPS.linear.default or not is_constant(weight):
        return None
    layouts = {ctx.layouts.get(name) for name in edit.source_of(weight).names}
    name = layouts.pop() if len(layouts) == 1 else None
    return format_named(name) if name else None


class _Packer:
    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._packed: dict[tuple[str, ...], tuple[Format, tuple[fx.Node, ...]]] = {}

    def format_of(self, weight: fx.Node) -> Format | None:
        """The format in which a linear has packed the weight."""
        return self._packed.get(edit.source_of(weight).names, (None, ()))[0]

    def replace(self, node: fx.Node, form: Format) -> bool:
        def pack(weight: fx.Node, transposed: bool = False) -> tuple[fx.Node, ...]:
            return self._pack(weight, form, bool(transposed))

        call = form.readers[node.target](node.args, pack)
        return call is not None and edit.replace(node, *call)

    def _pack(self, weight: fx.Node, form: Format, transposed: bool) -> tuple[fx.Node, ...]:
        source = edit.source_of(weight)
        if source.names in self._packed:
            return self._packed[source.names][1]
        value: Tensor = weight.meta["val"].mT if transposed else weight.meta["val"]
        source = replace(source, format=form.name, transpose=source.transpose != transposed)
        nodes = tuple(
            edit.constant(
                self._graph, "__".join(filter(None, (str(weight.target), form.name, part))),
                torch.empty(shape, dtype=dtype, device="meta"), weight=replace(source, part=part),
            )
            for part, (shape, dtype) in form.shapes(tuple(value.shape), value.dtype).items()
        )  # fmt: skip
        self._packed[source.names] = form, nodes
        return nodes
