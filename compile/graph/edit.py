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


def constant(graph: fx.GraphModule, name: str, value: Tensor, **meta: object) -> fx.Node:
    """A new get_attr node at the top; `meta` says where its value comes from (weight= or fqn=)."""
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        node = graph.graph.create_node("get_attr", name.replace(".", "__"))
    like = torch.empty(value.shape, dtype=value.dtype, device="meta")
    graph.register_buffer(node.target, like)
    node.meta = {"val": like, **meta}
    return node


def replace(graph: fx.Graph, old: fx.Node, target: object, args: tuple) -> fx.Node:
    """A call in the place of `old`, with its value and users."""
    with graph.inserting_before(old):
        new = graph.call_function(target, args)
    copy_meta(old, new, old.meta["val"])
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    return new


def copy_meta(source: fx.Node, target: fx.Node, value: object) -> None:
    """`target` stands where `source` stood, with its own value."""
    target.meta = {key: item for key, item in source.meta.items() if key == "nn_module_stack"}
    target.meta["val"] = value


def hoist_constants(graph: fx.Graph) -> None:
    """get_attr nodes to the top, so that any call may be moved without looking at them."""
    first = next(iter(graph.nodes))
    for node in [n for n in graph.nodes if n.op == "get_attr" and n is not first]:
        first.prepend(node)


def meta_int(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def constant_name(node: fx.Node) -> str:
    """Key of a get_attr node's value: the parameter's path, or the node's own name for one that a pass made."""
    return node.meta["fqn"] if "fqn" in node.meta else str(node.target)
