"""Products with a weight as the op linear, whose weight is [out, in].

aten.linear(x, weight, bias)                             -> linear(x, weight, bias)
aten.linear(x, transpose(weight), bias)                  -> linear(x, weight^T, bias)     a constant weight [in, out]
addmm(bias, x, weight) of a constant weight [in, out]    -> linear(x, weight^T, bias)     GPT-2's Conv1D
expert_linear(x, ids, view(weight), bias)                -> expert_linear(x, ids, weight as the view, bias)
matmul(weight, transpose(x, 1, 2)) of a constant weight  -> transpose(linear(x, weight), 1, 2)    Mamba
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fuseline.compile.graph.edit import constant, insert_call, replace, take_over
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import is_constant
from fuseline.compile.specs import WeightSource

aten = torch.ops.aten
OPS = torch.ops.fuseline
VIEWS = (aten.view.default, aten.reshape.default)


def find_linear(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    matches = 0
    for node in list(graph.graph.nodes):
        args = None
        if node.target is aten.linear.default and not node.kwargs:
            args = _turned_args(graph, *(*node.args, None)[:3])
        elif node.target is aten.addmm.default and not node.kwargs:
            args = _conv1d_args(graph, node)
        elif node.target is OPS.expert_linear.default:
            matches += _view_weight(graph, node)
        elif node.target is aten.matmul.default:
            matches += _from_left(node)
        matches += args is not None and replace(node, OPS.linear.default, args)
    return PassResult(matches)


def _from_left(node: fx.Node) -> bool:
    """Rewrites a product whose weight stands on the left."""
    weight, x = node.args
    if not is_constant(weight) or weight.meta["val"].dim() != 2 or x.target is not aten.transpose.int:
        return False
    source, value = x.args[0], node.meta["val"]
    if sorted(dim % 3 for dim in x.args[1:]) != [1, 2] or value.dim() != 3:
        return False
    product = insert_call(node, OPS.linear.default, (source, weight, None), node, value.mT.contiguous())
    take_over([node], [insert_call(node, aten.transpose.int, (product, 1, 2), node, product.meta["val"].mT)])
    return True


def _view_weight(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Puts a constant in place of the view of one as an op's weight."""
    view = node.args[2]
    if view.target not in VIEWS or not is_constant(view.args[0]) or "fqn" not in view.args[0].meta:
        return False
    value: Tensor = view.meta["val"]
    source = WeightSource((view.args[0].meta["fqn"],), shape=tuple(value.shape))
    node.update_arg(2, constant(graph, f"{view.args[0].target}__viewed", value, weight=source))
    return True


def _turned_args(graph: fx.GraphModule, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> tuple:
    """The arguments of linear, with a constant in place of one that is transposed."""
    is_turned = weight.target in (aten.mT.default, aten.t.default, aten.numpy_T.default)
    if is_turned and is_constant(weight.args[0]) and "fqn" in weight.args[0].meta:
        weight = _turned(graph, weight.args[0])
    return x, weight, bias


def _conv1d_args(graph: fx.GraphModule, node: fx.Node) -> tuple | None:
    """The arguments of linear for an addmm whose weight is a parameter, else None."""
    bias, x, weight = node.args
    if not is_constant(weight) or "fqn" not in weight.meta:
        return None
    return x, _turned(graph, weight), bias


def _turned(graph: fx.GraphModule, weight: fx.Node) -> fx.Node:
    """A matrix of the checkpoint, transposed as it is loaded."""
    value: Tensor = weight.meta["val"]
    source = WeightSource((weight.meta["fqn"],), transpose=True)
    return constant(graph, f"{weight.target}__turned", value.t(), weight=source)
