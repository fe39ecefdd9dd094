"""Reads the weights of some layers from slots that the host fills during the step.

    y = linear(x, weight)
->
    weights = prefetch.fetch(layer); y = linear(x, weights[0]); prefetch.release(layer)

`prefetch` is a new first input. A layer is fetched before the first op that reads one of its weights, and released
after the last.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fuseline.compile.graph.edit import take_over
from fuseline.compile.graph.graph_pass import GraphPass, PassContext, PassResult

PREFETCH = "prefetch"
"""Name of the new input."""


def stream_weights(layers: Sequence[Sequence[str]]) -> GraphPass:
    """`layers` lists the get_attr targets of each layer's weights, in the order of computation."""

    def stream_weights(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
        nodes = graph.graph.nodes
        of_name = {str(node.target): node for node in nodes if node.op == "get_attr"}
        with graph.graph.inserting_before(next(iter(nodes))):
            prefetch = graph.graph.placeholder(PREFETCH)
        for index, names in enumerate(layers):
            _stream_layer(graph.graph, prefetch, index, [of_name[name] for name in names])
        return PassResult(len(layers))

    return stream_weights


def _stream_layer(graph: fx.Graph, prefetch: fx.Node, index: int, weights: Sequence[fx.Node]) -> None:
    users = sorted(user for node in weights for user in node.users)
    with graph.inserting_before(users[0]):
        fetched = graph.call_method("fetch", (prefetch, index))
        parts = [graph.call_method("__getitem__", (fetched, place)) for place in range(len(weights))]
    with graph.inserting_after(users[-1]):
        graph.call_method("release", (prefetch, index))
    take_over(weights, parts)
