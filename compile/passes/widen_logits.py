"""Converts the output logits to fp32."""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.graph.edit import insert_call, results_of
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.match import cast


def widen_logits(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    return PassResult(int(widen_output(graph.graph)))


def widen_output(graph: fx.Graph) -> bool:
    """Logits in fp32; False when they are so already."""
    output, logits = graph.output_node(), results_of(graph)[0]
    if logits.meta["val"].dtype == torch.float32:
        return False
    wide = insert_call(output, cast, (logits, torch.float32), logits, logits.meta["val"].float())
    output.replace_input_with(logits, wide)
    return True
