"""Gives recurrences their state: one slot a sequence, kept from step to step.

    out = gated_delta(q, k, v, g, beta, normalize)
->
    out = gated_delta_slots(q, k, v, g, beta, recurrent_state_N, state_slots, seq_lens, query_start, normalize)

States are numbered in the order of the graph; they and the batch metadata are graph inputs.
"""

from __future__ import annotations

import torch
from torch import fx

from fuseline.compile.graph.edit import insert_call, meta_int, placeholder, take_over
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph_inputs import state_name
from fuseline.compile.kernels.plan_call import meta_value
from fuseline.compile.ops.library import Op, named_arguments
from fuseline.compile.ops.registry import op_of, registry
from fuseline.compile.specs import StateSpec


def page_state(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Returns a StateSpec for each recurrence. Raises ValueError on a GPU."""
    found = [(node, op) for node in graph.graph.nodes if (op := op_of(node.target)) and op.state]
    if found and ctx.target.kind != "cpu":
        raise ValueError("models with recurrent states are served on a CPU only: add --device cpu")
    specs = []
    for number, (node, op) in enumerate(found):
        shape, dtype = op.state(*map(meta_value, node.args))
        spec = StateSpec(number, tuple(map(int, shape)), str(dtype).removeprefix("torch."))
        _rewrite(graph.graph, node, registry()[f"{op.name}_slots"], spec)
        specs.append(spec)
    return PassResult(len(specs), tuple(specs))


def _rewrite(graph: fx.Graph, node: fx.Node, op: Op, spec: StateSpec) -> None:
    state = torch.empty(2, *spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
    given = named_arguments(node) | {
        "state": placeholder(graph, state_name(spec.number), state),
        "slots": placeholder(graph, "state_slots", meta_int(2)),
        "seq_lens": placeholder(graph, "seq_lens", meta_int(2, dtype=torch.int32)),
        "query_start": placeholder(graph, "query_start", meta_int(3, dtype=torch.int32)),
    }
    args = tuple(given[name] for name in op.arguments)
    take_over([node], [insert_call(node, op.target, args, node, node.meta["val"])])
