"""Converts the output logits to fp32."""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.graph.edit import insert_call
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import cast


def widen_logits(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    output = graph.graph.output_node()
    logits: fx.Node = output.args[0]
    if logits.meta["val"].dtype == torch.float32:
        return PassResult(0)
    output.update_arg(0, insert_call(output, cast, (logits, torch.float32), logits, logits.meta["val"].float()))
    return PassResult(1)
