"""Level 2: builds the plan with compiled regions while the server runs the plan without them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Set

import torch
from torch import Tensor, fx

from fuseline.compile.backends.cpu_plan.lowering import Lowered
from fuseline.compile.backends.cpu_plan.plan import PlanExecutable, RegionKernel
from fuseline.compile.backends.cpu_plan.steps import StepKind, StepPlans, join, step_kinds
from fuseline.compile.backends.inductor.job import RegionJob, make_job
from fuseline.compile.backends.inductor.library import Kernel
from fuseline.compile.backends.inductor.regions import compile_regions, region_folder, region_name
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.graph_pass import PassContext
from fuseline.compile.graph.region import Region
from fuseline.compile.passes.pipeline import REGIONS

logger = logging.getLogger(__name__)


class RegionUpgrade(threading.Thread):
    """`result` is set once the thread has ended: None if no region was compiled. `weights` by get_attr target."""

    def __init__(self, graph: fx.GraphModule, weights: Mapping[str, Tensor], config: CompileConfig) -> None:
        super().__init__(name="compile-regions", daemon=True)
        self.stop = threading.Event()
        self.result: PlanExecutable | StepPlans | None = None
        self._graph = graph
        self._weights = weights
        self._config = config

    def run(self) -> None:
        try:
            self.result = self._upgrade()
        except Exception as error:  # the plan without compiled regions stays in use
            logger.warning("regions stay with eager torch: %s: %s", type(error).__name__, error)

    def _upgrade(self) -> PlanExecutable | StepPlans | None:
        # Marked before copying: every kind of step has the same regions and so the same bits.
        ctx = PassContext(self._config, None, 0, 0)
        marks = set(range(sum(graph_pass(self._graph, ctx).matches for graph_pass in REGIONS)))
        kinds = step_kinds(self._graph, self._config)
        jobs = [_jobs(kind.lower(marks)) for kind in kinds]
        texts = {region_name(job.text): job.text for found in jobs for job in found.values()}
        kernels = compile_regions(texts, region_folder(self._config.cache_dir), self.stop, torch.get_num_threads())
        if not kernels or self.stop.is_set():
            return None
        # A region that some kind of step lacks is unmarked in all: its ops keep their kernels.
        marks = set.intersection(*(_compiled(found, kernels) for found in jobs))
        return join([self._plan(kind, marks, kernels) for kind in kinds], self._config)

    def _plan(self, kind: StepKind, marks: Set[int], kernels: Mapping[str, Kernel]) -> PlanExecutable:
        lowered = kind.lower(marks)
        jobs = _jobs(lowered)
        final = {
            mark: RegionKernel(kernels[region_name(jobs[mark].text)], jobs[mark].args)
            for mark in _compiled(jobs, kernels)
        }
        return PlanExecutable(lowered, self._weights, final)


def _compiled(jobs: Mapping[int, RegionJob], kernels: Mapping[str, Kernel]) -> set[int]:
    return {mark for mark, job in jobs.items() if region_name(job.text) in kernels}


def _jobs(lowered: Lowered) -> dict[int, RegionJob]:
    """Jobs by mark; a mark split over several regions has none."""
    regions = [step for step in lowered.steps if isinstance(step, Region) and step.mark is not None]
    counts = [region.mark for region in regions]
    jobs = {r.mark: make_job(r, lowered.values) for r in regions if counts.count(r.mark) == 1}
    return {mark: job for mark, job in jobs.items() if job is not None}
