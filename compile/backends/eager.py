"""Level 0: the graph with reference ops, run by torch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from fuseline.compile.graph.region import ops_of
from fuseline.compile.graph_inputs import GraphOutput


class EagerExecutable:
    """Runs a graph with constants from `weights`, by get_attr target, and inputs by placeholder name."""

    def __init__(self, graph: fx.GraphModule, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            setattr(graph, name, weight)
        graph.recompile()
        self._graph = graph
        self._bound: dict[str, Tensor] = {}
        self._inputs = [node.target for node in graph.graph.nodes if node.op == "placeholder"]

    @property
    def torch_ops(self) -> set[str]:
        return ops_of(self._graph.graph.nodes)

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets inputs that persist for all later runs: caches and states."""
        self._bound |= tensors

    def run(self, values: Mapping[str, Tensor]) -> GraphOutput:
        known = self._bound | values
        return self._graph(*(known[name] for name in self._inputs))
