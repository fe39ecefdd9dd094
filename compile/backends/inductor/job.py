"""A region as text: what a compiler in another process needs to know of it, and its name in the cache.

    {"inputs": [{"dtype", "sizes", "strides"}, ...], "num_outputs": n, "graph": graph_json.encode(...)}

The graph takes the region's inputs, then the memory of its outputs, writes these and returns nothing: outputs land in
the arena without a copy. Sizes known only at run time are [factor, symbol]. Equal layers give equal text.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fuseline.compile.backends.cpu_plan.sizes import SYMBOLS, decode
from fuseline.compile.graph.graph_json import GraphFormatError, encode
from fuseline.compile.graph.region import Region, storage_key, tensors_of

aten = torch.ops.aten


@dataclass(frozen=True)
class RegionJob:
    text: str
    """What is compiled."""
    args: tuple[Tensor, ...]
    """Meta tensors of what it is called with: inputs, then outputs."""


def make_job(region: Region, values: Mapping[fx.Node, object]) -> RegionJob | None:
    """None for a region that has to stay with eager torch: it writes what it did not make, or calls our own ops."""
    outputs = [tensors_of(values[node])[index or 0] for node, index in region.outputs]
    inputs = [values[node] for node in region.inputs]
    if not all(isinstance(tensor, Tensor) for tensor in inputs) or _writes_inputs(region, values):
        return None
    try:
        graph = _Writer(region, values).graph(outputs)
        sizes = [describe(tensor) for tensor in (*inputs, *outputs)]
        text = json.dumps({"inputs": sizes, "num_outputs": len(outputs), "graph": encode(graph)}, sort_keys=True)
    except (GraphFormatError, ValueError):
        return None
    return None if '"fuseline.' in text else RegionJob(text, (*inputs, *outputs))


def describe(tensor: Tensor) -> dict[str, object]:
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sizes": [decode(n) for n in tensor.shape],
        "strides": [decode(n) for n in tensor.stride()],
    }


def _writes_inputs(region: Region, values: Mapping[fx.Node, object]) -> bool:
    outside = {storage_key(tensor) for node in region.inputs for tensor in tensors_of(values[node])}
    for node in region.nodes:
        schema = getattr(node.target, "_schema", None)
        for arg, value in zip(schema.arguments if schema else (), node.args, strict=False):
            is_written = arg.alias_info is not None and arg.alias_info.is_write
            if is_written and any(storage_key(t) in outside for t in tensors_of(values.get(value))):
                return True
    return False


class _Writer:
    """Copies nodes into a graph of their own, with numbers for names."""

    def __init__(self, region: Region, values: Mapping[fx.Node, object]) -> None:
        self._region = region
        self._values = values
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[int, fx.Node] = {}
        self._symbols: dict[int, fx.Node] = {}

    def graph(self, outputs: Sequence[Tensor]) -> fx.Graph:
        region = self._region
        tensors = [*(self._values[node] for node in region.inputs), *outputs]
        places = [self._graph.placeholder(f"a{k}") for k in range(len(tensors))]
        self._copies.update(zip(region.inputs, places, strict=False))
        self._find_symbols(places, tensors)
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

    def _find_symbols(self, places: Sequence[fx.Node], tensors: Sequence[Tensor]) -> None:
        """Where each unknown size can be read, at the first dimension that is a multiple of it."""
        for place, tensor in zip(places, tensors, strict=True):
            for dim, number in enumerate(tensor.shape):
                size = decode(number)
                if isinstance(size, tuple) and size[1] not in self._symbols:
                    node = self._graph.call_function(aten.sym_size.int, (place, dim))
                    if size[0] > 1:
                        node = self._graph.call_function(operator.floordiv, (node, size[0]))
                    self._symbols[size[1]] = node

    def _arg(self, arg: object) -> object:
        if isinstance(arg, fx.Node) and arg in self._copies:
            return self._copies[arg]
        value = self._values[arg] if isinstance(arg, fx.Node) else arg
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        size = decode(value)
        return self._size(*size) if isinstance(size, tuple) else size

    def _size(self, factor: int, symbol: int) -> fx.Node:
        if symbol not in self._symbols:
            raise ValueError(f"no tensor of the region tells {SYMBOLS[symbol]}")
        if factor == 1:
            return self._symbols[symbol]
        return self._graph.call_function(operator.mul, (self._symbols[symbol], factor))
