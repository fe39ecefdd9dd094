"""A region serialized to text: the input of the compiler process and the source of its cache name.

    {"inputs": [{"dtype", "sizes", "strides"}, ...], "num_outputs": n, "graph": graph_json.encode(...)}

The graph takes the region's inputs, then the memory of its outputs, writes these and returns nothing: outputs land in
the arena without a copy. Sizes known only at run time are [constant, factor, symbol]. Equal layers
give equal text.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fuseline.compile.backends.cpu_plan.sizes import SYMBOLS, Linear
from fuseline.compile.backends.cpu_plan.symbolic import NonLinear, Values, View, views_of
from fuseline.compile.graph.graph_json import GraphFormatError, encode
from fuseline.compile.graph.region import Region

aten = torch.ops.aten


@dataclass(frozen=True)
class RegionJob:
    text: str
    """The serialized region."""
    args: tuple[View, ...]
    """Arguments of the compiled region: inputs, then outputs."""


def make_job(region: Region, values: Values) -> RegionJob | None:
    """None for a region that must stay in eager torch: it mutates its inputs or calls custom ops."""
    outputs = [views_of(values[node])[index or 0] for node, index in region.outputs]
    inputs = [values[node] for node in region.inputs]
    if not all(isinstance(view, View) for view in inputs) or _writes_inputs(region, values):
        return None
    try:
        graph = _Writer(region, values).graph(outputs)
        sizes = [describe(view) for view in (*inputs, *outputs)]
        text = json.dumps({"inputs": sizes, "num_outputs": len(outputs), "graph": encode(graph)}, sort_keys=True)
    except (GraphFormatError, ValueError):
        return None
    return None if '"fuseline.' in text else RegionJob(text, (*inputs, *outputs))


def describe(view: View) -> dict[str, object]:
    return {
        "dtype": str(view.dtype).removeprefix("torch."),
        "sizes": view.sizes,
        "strides": view.strides,
    }


def _writes_inputs(region: Region, values: Values) -> bool:
    outside = {view.storage for node in region.inputs for view in views_of(values[node])}
    for node in region.nodes:
        schema = getattr(node.target, "_schema", None)
        for arg, value in zip(schema.arguments if schema else (), node.args, strict=False):
            is_written = arg.alias_info is not None and arg.alias_info.is_write
            if is_written and any(view.storage in outside for view in views_of(values[value])):
                return True
    return False


class _Writer:
    """Copies nodes into a new graph with numbered names."""

    def __init__(self, region: Region, values: Values) -> None:
        self._region = region
        self._values = values
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[int, fx.Node] = {}
        self._symbols: dict[int, fx.Node] = {}

    def graph(self, outputs: Sequence[View]) -> fx.Graph:
        region = self._region
        views = [*(self._values[node] for node in region.inputs), *outputs]
        places = [self._graph.placeholder(f"a{k}") for k in range(len(views))]
        self._copies.update(zip(region.inputs, places, strict=False))
        self._find_symbols(places, views)
        for k, node in enumerate(region.nodes):
            args, kwargs = fx.node.map_aggregate(node.args, self._arg), fx.node.map_aggregate(node.kwargs, self._arg)
            self._copies[node] = self._graph.create_node("call_function", node.target, args, kwargs, f"n{k}")
        for (node, index), place in zip(region.outputs, places[len(region.inputs) :], strict=True):
            result = self._copies[node]
            if index is not None:
                result = self._graph.call_function(operator.getitem, (result, index))
            self._graph.call_function(aten.copy_.default, (place, result))
        self._graph.output(())
        return self._graph

    def _find_symbols(self, places: Sequence[fx.Node], views: Sequence[View]) -> None:
        """The first dimension from which each unknown size can be read."""
        for place, view in zip(places, views, strict=True):
            for dim, size in enumerate(view.sizes):
                if isinstance(size, Linear) and size.symbol not in self._symbols:
                    node = self._graph.call_function(aten.sym_size.int, (place, dim))
                    if size.constant:
                        node = self._graph.call_function(operator.sub, (node, size.constant))
                    if size.factor > 1:
                        node = self._graph.call_function(operator.floordiv, (node, size.factor))
                    self._symbols[size.symbol] = node

    def _arg(self, arg: object) -> object:
        if not isinstance(arg, fx.Node):
            return arg
        if arg in self._copies:
            return self._copies[arg]
        value = self._values[arg]
        if isinstance(value, NonLinear):
            raise ValueError(f"{arg.name} is not linear in an unknown size")
        return self._size(value) if isinstance(value, Linear) else value

    def _size(self, size: Linear) -> fx.Node:
        if size.symbol not in self._symbols:
            raise ValueError(f"no tensor of the region tells {SYMBOLS[size.symbol]}")
        node = self._symbols[size.symbol]
        if size.factor != 1:
            node = self._graph.call_function(operator.mul, (node, size.factor))
        return self._graph.call_function(operator.add, (node, size.constant)) if size.constant else node
