"""Inputs of linears with fp8 weights become fp8 too, where the configuration asks for it and the GPU multiplies fp8.

    y = linear_code_rows(x, codes, scales, .., kind=fp8)
->
    q, s = quantize_fp8(x); y = linear_fp8(q, s, codes, scales, ..)

The linear that gives the logits keeps its inputs.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fuseline.compile.graph.edit import insert_call, replace, results_of
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.ops.coded import KINDS
from fuseline.compile.ops.fp8 import fake_codes

OPS = torch.ops.fuseline
FP8_INPUTS = "fp8"
OLDER = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_87")
"""GPUs that have no products of fp8."""
ALIGNED = 16
"""Inputs are a multiple of it, so that rows begin at multiples of 16 bytes."""


def quantize_inputs(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    if ctx.config.activation_dtype != FP8_INPUTS or ctx.target.isa in OLDER:
        return PassResult(0)
    quantized: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    logits = _product_behind(results_of(graph.graph)[0])
    found = [node for node in graph.graph.nodes if node is not logits and _takes_fp8(node)]
    for node in found:
        x, codes, scales, *_, bias, group, _ = node.args
        if x not in quantized:
            quantized[x] = _quantized(x, node)
        replace(node, OPS.linear_fp8.default, (*quantized[x], codes, scales, bias, group, x.meta["val"].dtype))
    return PassResult(len(found))


def _product_behind(result: fx.Node) -> fx.Node:
    """The linear that gives a result, perhaps through ops of one input, such as a soft-cap's."""
    while result.target is not OPS.linear_code_rows.default and len(result.all_input_nodes) == 1:
        (result,) = result.all_input_nodes
    return result


def _takes_fp8(node: fx.Node) -> bool:
    if node.target is not OPS.linear_code_rows.default:
        return False
    x, _, _, zeros, _, order, _, group, kind = node.args
    is_sized = x.meta["val"].shape[-1] % ALIGNED == 0 and group % 128 == 0
    return kind == KINDS["fp8"] and zeros is None and order is None and is_sized


def _quantized(x: fx.Node, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(codes, scales) of x, before a node that reads it."""
    value = fake_codes(x.meta["val"])
    whole = insert_call(before, OPS.quantize_fp8.default, (x,), before, value)
    return tuple(insert_call(before, operator.getitem, (whole, k), before, value[k]) for k in range(2))
