"""Fuses a norm with the quantization behind it: the row is read once.

    q, s = quantize_fp8(rms_norm(x, ...))            ->   q, s = rms_norm_fp8(x, ...)
    y, sum = add_rms_norm(x, ...); quantize_fp8(y)   ->   q, s, sum = add_rms_norm_fp8(x, ...)

Only where nothing else reads the norm: a router of experts does.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fuseline.compile.graph.edit import replace_all
from fuseline.compile.graph.graph_pass import each_call

OPS = torch.ops.fuseline


@each_call
def fuse_norm_quant(node: fx.Node) -> bool:
    if node.target is not OPS.quantize_fp8.default or len(node.args[0].users) > 1:
        return False
    parts, norm = _parts(node, 2), node.args[0]
    if norm.target is OPS.rms_norm.default:
        return all(parts) and replace_all(parts, OPS.rms_norm_fp8.default, norm.args)
    if norm.target is not operator.getitem or norm.args[0].target is not OPS.add_rms_norm.default:
        return False
    olds = [*parts, _parts(norm.args[0], 2)[1]]
    return norm.args[1] == 0 and all(olds) and replace_all(olds, OPS.add_rms_norm_fp8.default, norm.args[0].args)


def _parts(node: fx.Node, count: int) -> list[fx.Node | None]:
    """Nodes that take result k of a call, None where nothing does."""
    found = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    return [found.get(k) for k in range(count)]
