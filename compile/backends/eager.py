"""Level 0: the graph with reference ops, run by torch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from fuseline.compile.graph.edit import constant_name
from fuseline.compile.graph_inputs import GraphOutput


class EagerExecutable:
    """Runs a graph with constants from `weights` (by fqn) and inputs by placeholder name."""

    def __init__(self, graph: fx.GraphModule, weights: Mapping[str, Tensor]) -> None:
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                setattr(graph, node.target, weights[constant_name(node)])
        graph.recompile()
        self._graph = graph
        self._bound: dict[str, Tensor] = {}
        self._inputs = [node.target for node in graph.graph.nodes if node.op == "placeholder"]

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets inputs that persist for all later runs: the caches."""
        self._bound |= tensors

    def run(self, values: Mapping[str, Tensor]) -> GraphOutput:
        known = self._bound | values
        return self._graph(*(known[name] for name in self._inputs))
