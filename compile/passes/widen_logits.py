"""Converts the output logits to fp32."""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.graph import edit
from fuseline.compile.graph.graph_pass import PassContext, PassResult


def widen_logits(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    is_changed = widen_output(graph.graph)
    return PassResult(int(is_changed), is_changed)


def widen_output(graph: fx.Graph) -> bool:
    """Logits in fp32; False when they are so already."""
    output, logits = graph.output_node(), edit.results_of(graph)[0]
    if logits.meta["val"].dtype == torch.float32:
        return False
    convert = torch.ops.prims.convert_element_type.default
    wide = edit.insert_call(graph, output, convert, (logits, torch.float32), logits, logits.meta["val"].float())
    output.replace_input_with(logits, wide)
    return True
