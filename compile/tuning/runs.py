"""Level 3 on a GPU: up to how many rows the persistent kernel computes a run of ops faster than their own kernels.

Measured when the kernels of single ops have been chosen, with which it is compared. A run's first node has the result
in meta["run_choices"], ranges of rows as an op has them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, fx

from fuseline.compile.config import CompileConfig, Progress
from fuseline.compile.kernels.cuda.library import CudaLibrary
from fuseline.compile.kernels.cuda.linear import FEW_ROWS
from fuseline.compile.kernels.cuda.persistent import PersistentRun, library_of_runs
from fuseline.compile.kernels.registry import ANY, OpCall
from fuseline.compile.kernels.select import Kernels, describe
from fuseline.compile.passes.fuse_persistent import BY_OPS, RUN_CHOICES, Run, find_runs, run_candidates
from fuseline.compile.target import Target
from fuseline.compile.tuning.kernels import Calls, Problem, Tuner, cache_key, is_choice
from fuseline.compile.tuning.timer import Arguments, Timer
from fuseline.compile.tuning.tuned import measured_once

ENDS = (1, 2, 4, 8, FEW_ROWS)
"""Ends of the ranges of rows that are measured; more are computed op by op."""
MOST_RUNS = 4
"""Layers that are measured one behind the other."""


def tune_runs(
    graph: fx.GraphModule, weights: Mapping[str, Tensor], config: CompileConfig, target: Target, progress: Progress,
    timer: Timer | None = None, kernels: Kernels | None = None,
) -> None:  # fmt: skip
    """Sets the choices of every run that the persistent kernel can compute. `weights` by get_attr target, all on the
    device: where some are on the host, nothing is measured."""
    library = library_of_runs(target)
    if library is None or config.batch_invariant or config.cpu_offload_gb:
        return
    finder = kernels or Kernels(target)
    constants = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    runs: dict[Problem, list[Run]] = defaultdict(list)
    for run in find_runs(graph, target, constants):
        runs[_problem(run, target, constants)].append(run)
    if not runs:
        return
    tuner = _RunTuner(weights, config, target, timer)

    def choose(problem: Problem) -> dict[str, list[list]]:
        alike = runs[problem][:MOST_RUNS]
        targets = {node.name: finder.find(node, constants).run for run in alike for node in run.nodes}
        return tuner.choose(problem, Calls(alike, _candidates(alike, weights, targets, library)))

    chosen = measured_once(
        config, cache_key(runs, config, target), list(runs), choose,
        lambda problem, choice: is_choice(run_candidates(int, int), choice), progress,
    )  # fmt: skip
    for problem, alike in runs.items():
        for run in alike:
            run.nodes[0].meta[RUN_CHOICES] = chosen[problem]


class _RunTuner(Tuner):
    """Measures several runs, one behind the other; `nodes` of its calls are runs."""

    def choose(self, problem: Problem, calls: Calls) -> dict[str, list[list]]:
        """Of more rows than are measured all ops are called one by one."""
        return {phase: _with_end(ranges) for phase, ranges in super().choose(problem, calls).items()}

    def sizes(self, phase: str) -> list[tuple[int, int]]:
        most = min(self.config.max_num_seqs, self.config.max_num_batched_tokens)
        return [(end, end) for end in ENDS if end <= most]

    def arguments(self, calls: Calls, phase: str, rows: int) -> Arguments:
        return self.calls.run_arguments(calls.nodes, rows)


def _with_end(ranges: Sequence[list]) -> list[list]:
    before = ranges[:-1] if ranges[-1][1] == BY_OPS else ranges
    return [*before, [ANY, BY_OPS]]


def _candidates(
    alike: Sequence[Run], weights: Mapping[str, Tensor], targets: Mapping[str, Callable], library: CudaLibrary
) -> list:  # fmt: skip
    """Each computes any of the runs, by its place."""
    ops = [run.body(weights, targets) for run in alike]
    persistent = [PersistentRun(library, run.body_of_steps(weights)) for run in alike]
    return run_candidates(
        lambda place, *inputs: ops[place](*inputs), lambda place, *inputs: persistent[place](*inputs)
    )  # fmt: skip


def _problem(run: Run, target: Target, constants: set[str]) -> Problem:
    """Runs of the same ops over the same shapes."""
    calls = [OpCall.of(node, target, constants) for node in run.nodes if node.name in run.steps]
    shapes = "; ".join(f"{call.op._schema.name} {describe(call)}" for call in calls)
    return Problem("run", shapes, ", ".join(one.label for one in run_candidates(int, int)))
