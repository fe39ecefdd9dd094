"""The kernel of each op in the op's place, for a GPU: what a program calls.

    rms_norm(x, weight, eps, mode)   ->   kernel.run(x, weight, eps, mode)

What a graph captured on a CPU makes, it makes on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from fuseline.compile.graph.edit import map_arguments
from fuseline.compile.graph.graph_pass import GraphPass, PassContext, PassResult


def bind_kernels(runs: Mapping[str, Callable], device: torch.device) -> GraphPass:
    """`runs`: what is called in the place of each op, by the name of its node."""

    def on_device(arg: object) -> object:
        return device if isinstance(arg, torch.device) else arg

    def bind_kernels(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        for node in nodes:
            node.target = runs[node.name]
            map_arguments(node, on_device)
        return PassResult(len(nodes))

    return bind_kernels
