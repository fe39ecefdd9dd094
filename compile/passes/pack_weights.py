"""Weights in the storage format that the target's kernels read (compile/formats). On a CPU, panels:

linear(x, weight, bias)              -> linear_panels(x, weight as [ceil(N/16), K, 16], bias, N)
experts(..., gate_up, down)          -> experts_panels(...), transposed weights turned
expert_linear(x, ids, weight, bias)  -> expert_linear_panels(...), alike
head_linear(x, weight of each head)  -> head_linear_panels(...)
embedding(weight) of a packed weight -> embedding_panels: tied weights stay one copy
linear(x, weight of codes, bias)     -> linear_codes(...), the layout being the checkpoint's or that of --quantization
experts(..., both weights of codes)  -> experts_codes(...)
embedding(weight of codes)           -> embedding_codes(...), if the checkpoint has it in codes or a linear does
linear(x, computed weight, bias)     -> aten.linear, which torch computes

On a GPU plain weights stay as they are, and codes are read by linear_code_rows(...) and embedding_code_rows(...).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from fuseline.compile.formats.format import Format
from fuseline.compile.formats.registry import format_of_codes, formats_for
from fuseline.compile.graph import edit
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import is_constant
from fuseline.compile.ops.coded import MIXED
from fuseline.compile.quantization.methods import ONLINE
from fuseline.compile.specs import QuantizedSpec, WeightSource

aten = torch.ops.aten
OPS = torch.ops.fuseline
KEPT_PLAIN = (OPS.head_linear.default, OPS.expert_linear.default)
"""Products for whose weights there are no codes."""


def pack_weights(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    packer = _Packer(graph)
    forms = formats_for(ctx.config, ctx.target)
    matches, kept, is_online = 0, {}, ctx.config.quantization in ONLINE
    for target in (OPS.linear.default, OPS.experts.default, *KEPT_PLAIN):
        plain = next((form for form in forms if target in form.readers), None)
        for node in [n for n in graph.graph.nodes if n.target is target]:
            of_codes = _forms_of_codes(node, ctx)
            if target not in KEPT_PLAIN or not is_online:  # these stay plain, as embeddings do
                kept |= {name: of_codes.get(name) for name in _names_of_weights(node) if name in ctx.layouts}
            if plain and target is OPS.linear.default and not is_constant(node.args[1]):
                edit.replace(node, aten.linear.default, node.args)
            elif of_codes or plain:
                matches += packer.replace(node, of_codes, plain)
    for node in [n for n in graph.graph.nodes if n.target is aten.embedding.default and is_constant(n.args[0])]:
        # With online quantization embeddings stay plain, but for tied ones.
        form = packer.format_of(node.args[0]) or (None if is_online else _form_of(node.args[0], False, ctx))
        names = [name for name in _names_of_weights(node) if name in ctx.layouts and name not in kept]
        is_read = form is not None and node.target in form.readers and packer.replace(node, {}, form)
        kept |= {} if is_online else dict.fromkeys(names, form if is_read else None)
        matches += is_read
    return PassResult(matches, (QuantizedSpec(_in_words(kept)),) if kept else ())


def _names_of_weights(node: fx.Node) -> list[str]:
    return [name for arg in node.args if is_constant(arg) for name in edit.source_of(arg).names]


def _in_words(kept: Mapping[str, Format | None]) -> tuple[str, ...]:
    """From the format of each quantized weight, None for those that are dequantized."""
    counts = Counter(str(form.layout) if form else "" for form in kept.values())
    words = {"": "dequantized as they are loaded"}
    return tuple(f"{count} {words.get(name, 'as ' + name)}" for name, count in counts.most_common())


def _forms_of_codes(node: fx.Node, ctx: PassContext) -> dict[str, Format]:
    """The format of each weight by name, if all of the call's weights are codes for which the target has a kernel."""
    if node.target in KEPT_PLAIN:
        return {}
    weights = [node.args[1]] if node.target is OPS.linear.default else list(node.args[3:5])
    is_transposed = node.target is OPS.experts.default and node.args[8]
    forms = [_form_of(weight, is_transposed, ctx) for weight in weights]
    if not all(form and node.target in form.readers for form in forms):
        return {}
    return {name: form for weight, form in zip(weights, forms, strict=True) for name in edit.source_of(weight).names}


def _form_of(weight: fx.Node, is_transposed: bool, ctx: PassContext) -> Format | None:
    """The format of a weight that is made of codes of one layout, for which the target has a kernel."""
    if not is_constant(weight):
        return None
    layouts = {ctx.layouts.get(name) for name in edit.source_of(weight).names}
    name = layouts.pop() if len(layouts) == 1 else None
    if not name or name == MIXED:
        return None
    value: Tensor = weight.meta["val"].mT if is_transposed else weight.meta["val"]
    return format_of_codes(name, tuple(value.shape), ctx.target)


class _Packer:
    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._packed: dict[tuple[tuple[str, ...], tuple[int, ...]], tuple[Format, tuple[fx.Node, ...]]] = {}
        """By the names of parameters, and the part of each head."""

    def format_of(self, weight: fx.Node) -> Format | None:
        """The format in which a linear has packed the weight."""
        return self._packed.get(_key(edit.source_of(weight)), (None, ()))[0]

    def replace(self, node: fx.Node, of_codes: Mapping[str, Format], plain: Format | None) -> bool:
        """Packs the weights in their formats, by the name of their first parameter; `plain` is that of others."""

        def pack(weight: fx.Node, transposed: bool = False) -> tuple[fx.Node, ...]:
            return self._pack(weight, of_codes.get(edit.source_of(weight).names[0], plain), bool(transposed))

        reader = next(iter(of_codes.values()), plain).readers[node.target]
        call = reader(node.args, pack)
        return call is not None and edit.replace(node, *call)

    def _pack(self, weight: fx.Node, form: Format, transposed: bool) -> tuple[fx.Node, ...]:
        source = edit.source_of(weight)
        if (key := _key(source)) in self._packed:
            return self._packed[key][1]
        value: Tensor = weight.meta["val"].mT if transposed else weight.meta["val"]
        source = replace(source, format=form.name, transpose=source.transpose != transposed)
        nodes = tuple(
            edit.constant(
                self._graph, "__".join(filter(None, (str(weight.target), form.name, part))),
                torch.empty(shape, dtype=dtype, device="meta"), weight=replace(source, part=part),
            )
            for part, (shape, dtype) in form.shapes(tuple(value.shape), value.dtype).items()
        )  # fmt: skip
        self._packed[key] = form, nodes
        return nodes


def _key(source: WeightSource) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return source.names, source.heads
