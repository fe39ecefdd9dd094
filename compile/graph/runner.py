"""Runs passes in order. Clean-up, lint, spec checks, timing and op counts are done here only."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from fuseline.compile.graph.graph_pass import GraphPass, PassContext, PassResult
from fuseline.compile.graph.spec import attention_layers, cache_layers, check_edge
from fuseline.compile.ops import library


class PassError(ValueError):
    """A pass raised; the message names the pass and its error."""


@dataclass(frozen=True)
class PassReport:
    name: str
    stage: str
    matches: int
    seconds: float
    ops_before: int
    ops_after: int


@dataclass
class PipelineResult:
    reports: list[PassReport] = field(default_factory=list)
    stage_ops: dict[str, Counter] = field(default_factory=dict)
    """Op counts after each stage."""
    specs: list[object] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)


Stages = Sequence[tuple[str, Sequence[GraphPass]]]


def run_passes(graph: fx.GraphModule, stages: Stages, ctx: PassContext) -> PipelineResult:
    """Runs all stages. Raises ValueError if a disabled pass does not exist, and PassError or SpecError."""
    known = {graph_pass.__name__ for _, passes in stages for graph_pass in passes}
    if unknown := set(ctx.config.disabled_passes) - known:
        raise ValueError(f"there is no pass {sorted(unknown)[0]!r}; passes: {', '.join(sorted(known))}")
    result, layers, owners = PipelineResult(), attention_layers(graph), []
    for stage, passes in stages:
        owners = cache_layers(graph) or owners
        for graph_pass in passes:
            if graph_pass.__name__ not in ctx.config.disabled_passes:
                _run_pass(graph, graph_pass, stage, ctx, result)
        check_edge(graph, stage, layers, owners, ctx)
        result.stage_ops[stage] = count_ops(graph)
    return result


def _run_pass(
    graph: fx.GraphModule, graph_pass: GraphPass, stage: str, ctx: PassContext, result: PipelineResult
) -> None:
    before, started = num_ops(graph), time.perf_counter()
    done = _call(graph_pass, graph, ctx)
    seconds = time.perf_counter() - started
    result.reports.append(PassReport(graph_pass.__name__, stage, done.matches, seconds, before, num_ops(graph)))
    result.specs += done.specs
    result.constants |= done.constants


def _call(graph_pass: GraphPass, graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    try:
        done = graph_pass(graph, ctx)
        clean_up(graph)
    except Exception as error:
        cause = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise PassError(f"{graph_pass.__name__}: {cause}") from error
    return done


def clean_up(graph: fx.GraphModule) -> None:
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


def num_ops(graph: fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in graph.graph.nodes)


def count_ops(graph: fx.GraphModule) -> Counter:
    """Number of calls of each op, by its short name."""
    return Counter(op_name(node) for node in graph.graph.nodes if node.op == "call_function")


def op_name(node: fx.Node) -> str:
    """aten.linear.default -> aten.linear; fuseline.rope.default -> rope; operator.getitem -> getitem."""
    return library.op_name(node.target) or getattr(node.target, "__name__", str(node.target))
