"""Converts the output logits to fp32. On a CPU choose_kernels does it."""

from __future__ import annotations

from torch import fx

from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.passes.choose_kernels import widen_output


def widen_logits(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    is_changed = widen_output(graph.graph)
    return PassResult(int(is_changed), is_changed)
