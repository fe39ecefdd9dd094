"""The program of steps of few rows: runs of ops are one launch where -O3 has found that to be faster."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.graph_pass import PassContext
from fuseline.compile.kernels.choice import dispatcher
from fuseline.compile.kernels.cuda.persistent import PersistentRun, library_of_runs
from fuseline.compile.kernels.registry import Implementation
from fuseline.compile.ops.library import ROWS
from fuseline.compile.passes.fuse_persistent import RUN_CHOICES, Run, find_runs, run_candidates
from fuseline.compile.passes.pipeline import few_rows_passes
from fuseline.compile.target import Target


@dataclass(frozen=True)
class FewRows:
    """A program for steps of up to `max_rows` tokens."""

    program: fx.GraphModule
    max_rows: int


def few_rows_program(
    program: fx.GraphModule, graph: fx.GraphModule, runs: Mapping[str, Callable], target: Target
) -> FewRows | None:
    """None where no run is faster as one launch. `program` is `graph` with what is called in the place of each op,
    `runs`, by the name of its node; constants of both are never written."""
    if not any(RUN_CHOICES in node.meta for node in graph.graph.nodes):
        return None
    constants = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    found = [run for run in find_runs(graph, target, constants) if run.max_rows]
    if not found or library_of_runs(target) is None:
        return None
    few = fx.GraphModule(program, copy.deepcopy(program.graph))
    calls = [
        (run, _call(run, program, runs, target, behind.first_weight if behind else ""))
        for run, behind in zip(found, [*found[1:], None], strict=True)
    ]
    for graph_pass in few_rows_passes(calls):
        graph_pass(few, PassContext(CompileConfig(""), None, 0, 0, target=target))
    few.graph.lint()
    few.recompile()
    return FewRows(few, max(run.max_rows for run in found))


def _call(
    run: Run, program: fx.GraphModule, runs: Mapping[str, Callable], target: Target, next_weight: str
) -> Callable:  # fmt: skip
    """By rows: the run as one launch, which has L2 fetch the next run's first weight, or its ops one by one."""
    ahead = (getattr(program, next_weight),) if next_weight else ()
    persistent = PersistentRun(library_of_runs(target), run.body_of_steps(program), ahead)
    found: Implementation = dispatcher(
        run_candidates(run.body(program, runs), persistent), run.choices, lambda x, *_: (ROWS, x.numel() // x.shape[-1])
    )
    return found.run
