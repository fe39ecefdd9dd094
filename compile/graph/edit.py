"""Small edits of a graph that passes share."""

from __future__ import annotations

import torch
from torch import Tensor, fx


def placeholder(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    """The input called `name`; a new one goes behind the others."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        if node.target == name:
            return node
    with graph.inserting_after(inputs[-1]):
        node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def copy_meta(source: fx.Node, target: fx.Node, value: object) -> None:
    """`target` stands where `source` stood, with its own value."""
    target.meta = {key: item for key, item in source.meta.items() if key == "nn_module_stack"}
    target.meta["val"] = value


def meta_int(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
