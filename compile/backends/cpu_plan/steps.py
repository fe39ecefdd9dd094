"""The plans of a model: one for every step and, from level 3 on, one more for steps that only decode.

In a step that only decodes each sequence computes one token and wants its logits: tokens, sequences and rows of logits
are as many (T = S = R), and the rows are all there are:

    gather_rows(x, logits_rows)   ->   x

Kernels compute each row in one order whatever stands around it, so both plans give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fuseline.compile.backends.cpu_plan.lowering import Lowered, Lowering
from fuseline.compile.backends.cpu_plan.plan import PlanExecutable, limits_of, meta_inputs
from fuseline.compile.backends.cpu_plan.sizes import PRIMES
from fuseline.compile.config import CompileConfig
from fuseline.compile.ops.registry import op_of

DECODE_LEVEL = 3
DECODE_PRIMES = PRIMES | {"S": PRIMES["T"], "R": PRIMES["T"]}


@dataclass(frozen=True)
class StepKind:
    """A kind of step: the graph that computes it, how its sizes are told apart, the largest they can be."""

    graph: fx.GraphModule
    primes: Mapping[str, int]
    limits: Mapping[str, int]
    block_size: int

    def lower(self, marks: Set[int] = frozenset()) -> Lowered:
        inputs = meta_inputs(self.graph, self.block_size, self.primes)
        return Lowering(self.graph, inputs, self.limits, marks).run()


def step_kinds(graph: fx.GraphModule, config: CompileConfig) -> list[StepKind]:
    """The general kind first."""
    limits = limits_of(config)
    kinds = [StepKind(graph, PRIMES, limits, config.block_size)]
    if config.level >= DECODE_LEVEL:
        most = {**limits, "T": limits["S"]}
        kinds.append(StepKind(decode_graph(graph), DECODE_PRIMES, most, config.block_size))
    return kinds


def decode_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy that computes the logits of every token."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    for node in [node for node in copied.nodes if (op := op_of(node.target)) and op.picks_rows]:
        x, rows = node.args
        if rows.op == "placeholder" and rows.target == "logits_rows":
            node.replace_all_uses_with(x)
            copied.erase_node(node)
    return fx.GraphModule(graph, copied)


def lower(graph: fx.GraphModule, weights: Mapping[str, Tensor], config: CompileConfig) -> PlanExecutable | StepPlans:
    """The graph as plans; `weights` by get_attr target."""
    return join([PlanExecutable(kind.lower(), weights) for kind in step_kinds(graph, config)], config)


def join(plans: Sequence[PlanExecutable], config: CompileConfig) -> PlanExecutable | StepPlans:
    """Plans in the order of step_kinds."""
    return StepPlans(*plans, config.max_num_seqs) if len(plans) > 1 else plans[0]


class StepPlans:
    """Runs each step on the plan of its kind."""

    def __init__(self, general: PlanExecutable, decode: PlanExecutable, max_num_seqs: int) -> None:
        self.general = general
        self.decode = decode
        self._all_rows = torch.arange(max_num_seqs)

    @property
    def num_regions(self) -> int:
        return self.general.num_regions

    @property
    def arena_bytes(self) -> int:
        return self.general.arena_bytes + self.decode.arena_bytes

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        self.general.bind(tensors)
        self.decode.bind(tensors)

    def run(self, values: Mapping[str, Tensor]) -> Tensor:
        return (self.decode if self.only_decodes(values) else self.general).run(values)

    def only_decodes(self, values: Mapping[str, Tensor]) -> bool:
        rows, num_tokens = values["logits_rows"], values["token_ids"].shape[1]
        is_even = num_tokens == values["seq_lens"].shape[0] == rows.shape[0] <= len(self._all_rows)
        return is_even and torch.equal(rows, self._all_rows[:num_tokens])
