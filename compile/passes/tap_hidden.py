"""Gives the final hidden states, of the rows that have logits, beside the logits.

    logits = tail(linear(hidden[1, R, D], lm_head))
    output logits
->
    output logits, hidden
"""

from __future__ import annotations

from torch import fx

from fuseline.compile.graph.edit import results_of
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.passes.keep_last_logits import final_linear
from fuseline.compile.specs import TapSpec


def tap_hidden(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Returns a TapSpec. Raises ValueError if the graph does not end in a linear."""
    (logits,) = results_of(graph.graph)
    hidden = final_linear(logits)[-1].args[0]
    graph.graph.output_node().args = ((logits, hidden),)
    return PassResult(1, specs=(TapSpec(hidden.meta["val"].shape[-1]),))
