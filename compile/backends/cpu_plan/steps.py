"""The plans of a model: one for every step and, from level 3 on, another for decode-only steps.

In a decode-only step each sequence computes one token and needs its logits: T = S = R, and every row is selected:

    gather_rows(x, logits_rows)   ->   x

Kernels are batch invariant, so both plans give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, fx

from fuseline.compile.backends.cpu_plan.lowering import Lowered, Lowering
from fuseline.compile.backends.cpu_plan.plan import PlanExecutable, limits_of, meta_inputs
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.graph_pass import PassContext
from fuseline.compile.graph_inputs import GraphOutput, only_decodes
from fuseline.compile.passes.pipeline import DECODE

DECODE_LEVEL = 3
DECODE_SAME = MappingProxyType({"S": "T", "R": "T"})


@dataclass(frozen=True)
class StepKind:
    """A kind of step: its graph, its equal sizes, and the limits of its sizes."""

    graph: fx.GraphModule
    same: Mapping[str, str]
    """Symbol -> the symbol that always has the same size."""
    limits: Mapping[str, int]
    block_size: int

    def lower(self, marks: Set[int] = frozenset()) -> Lowered:
        inputs = meta_inputs(self.graph, self.block_size, self.same)
        return Lowering(self.graph, inputs, self.limits, marks).run()


def step_kinds(graph: fx.GraphModule, config: CompileConfig) -> list[StepKind]:
    """Kinds of steps, the general one first."""
    limits = limits_of(config)
    kinds = [StepKind(graph, MappingProxyType({}), limits, config.block_size)]
    if config.level >= DECODE_LEVEL:
        most = {**limits, "T": limits["S"]}
        kinds.append(StepKind(decode_graph(graph, config), DECODE_SAME, most, config.block_size))
    return kinds


def decode_graph(graph: fx.GraphModule, config: CompileConfig) -> fx.GraphModule:
    """A copy of the graph that computes the logits of every token."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    decode = fx.GraphModule(graph, copied)
    for graph_pass in DECODE:
        graph_pass(decode, PassContext(config, None, 0, 0))
    return decode


def lower(graph: fx.GraphModule, weights: Mapping[str, Tensor], config: CompileConfig) -> PlanExecutable | StepPlans:
    """Lowers the graph to plans; `weights` by get_attr target."""
    return join([PlanExecutable(kind.lower(), weights) for kind in step_kinds(graph, config)], config)


def join(plans: Sequence[PlanExecutable], config: CompileConfig) -> PlanExecutable | StepPlans:
    """Joins plans, given in the order of step_kinds."""
    return StepPlans(*plans, config.max_num_seqs) if len(plans) > 1 else plans[0]


@dataclass
class StepPlans:
    """Runs each step with the plan for its kind."""

    general: PlanExecutable
    decode: PlanExecutable
    max_decoded: int
    """Most sequences that the decode plan has memory for."""

    @property
    def num_regions(self) -> int:
        return self.general.num_regions

    @property
    def torch_ops(self) -> set[str]:
        return self.general.torch_ops | self.decode.torch_ops

    @property
    def arena_bytes(self) -> int:
        return self.general.arena_bytes + self.decode.arena_bytes

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        self.general.bind(tensors)
        self.decode.bind(tensors)

    def run(self, values: Mapping[str, Tensor]) -> GraphOutput:
        is_decode = values["seq_lens"].shape[0] <= self.max_decoded and only_decodes(values)
        return (self.decode if is_decode else self.general).run(values)
