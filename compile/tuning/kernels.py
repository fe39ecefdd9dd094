"""Level 3 on a GPU: the fastest kernel per range of rows, measured once per device and cached.

Each distinct problem (an op with its shapes) is measured at several numbers of rows with every candidate for them
(kernels/choice.py); a node's meta["choices"] then maps ranges of rows to candidates. The default stays unless another
is clearly faster. A candidate that raises is dropped from its problem, with one line in the log.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx

from fuseline import _C
from fuseline.compile import kernels as kernel_files
from fuseline.compile.cache.keys import version_of
from fuseline.compile.config import CompileConfig, Progress
from fuseline.compile.kernels.choice import chosen_label, default_choices
from fuseline.compile.kernels.registry import ANY, Implementation, OpCall
from fuseline.compile.kernels.select import Kernels, describe
from fuseline.compile.ops.library import DECODE, PREFILL
from fuseline.compile.ops.registry import op_of
from fuseline.compile.target import Target
from fuseline.compile.tuning.calls import CallMaker, has_constants
from fuseline.compile.tuning.timer import Arguments, DeviceTimer, Timer
from fuseline.compile.tuning.tuned import MIN_GAIN, measured_once

logger = logging.getLogger(__name__)
ROWS = (1, 8, 16, 32, 64, 128, 256)
"""Ends of the ranges of rows; a last range is unbounded."""
LARGE = 2048
"""Rows measured for the last range, and tokens of the prompt measured for steps with prompts."""


@dataclass(frozen=True, order=True)
class Problem:
    """Calls that differ only in their number of rows."""

    op: str
    shapes: str
    """Everything that is the same in every step."""
    labels: str
    """Names of the candidates."""


@dataclass
class Calls:
    """The nodes of a problem and their candidates, without those that failed."""

    nodes: list[fx.Node]
    candidates: list[Implementation]
    failed: set[str] = field(default_factory=set)


def tune_kernels(
    graph: fx.GraphModule, weights: Mapping[str, Tensor], config: CompileConfig, target: Target, progress: Progress,
    timer: Timer | None = None, kernels: Kernels | None = None,
) -> None:  # fmt: skip
    """Sets the choices of every node with several candidates, meta["choices"]. `weights` by get_attr target."""
    problems = _problems(graph, kernels or Kernels(target), config.batch_invariant)
    tuner = Tuner(weights, config, target, timer)
    chosen = measured_once(
        config, cache_key(problems, config, target), list(problems), lambda which: tuner.choose(which, problems[which]),
        lambda which, choice: is_choice(problems[which].candidates, choice), progress,
    )  # fmt: skip
    for problem, calls in problems.items():
        for node in calls.nodes:
            node.meta["choices"] = chosen[problem]


def is_choice(of: Sequence[Implementation], choice: object) -> bool:
    """Whether the choice names a candidate for every phase and number of rows."""
    default = default_choices(of)
    return isinstance(choice, dict) and choice.keys() == default.keys() and all(
        isinstance(ranges, list) and ranges and all(_is_range(of, phase, found) for found in ranges)
        and [most for most, _ in ranges] == sorted({most for most, _ in ranges}) and ranges[-1][0] == ANY
        for phase, ranges in choice.items()
    )  # fmt: skip


def _is_range(of: Sequence[Implementation], phase: str, found: object) -> bool:
    if not (isinstance(found, list) and len(found) == 2 and isinstance(found[0], int)):
        return False
    return any(c.label == found[1] and phase in c.phases and c.max_rows >= found[0] for c in of)


class Tuner:
    """Measures the candidates of problems on a device, size by size."""

    def __init__(
        self, weights: Mapping[str, Tensor], config: CompileConfig, target: Target, timer: Timer | None
    ) -> None:  # fmt: skip
        self.calls = CallMaker(weights, target.device)
        self.config = config
        self._device = target.device
        self._timer = timer or DeviceTimer()

    def choose(self, problem: Problem, calls: Calls) -> dict[str, list[list]]:
        """Per phase, a list of [upper bound of rows, label of the fastest candidate]."""
        default = default_choices(calls.candidates)
        found = {phase: self._ranges(problem, calls, phase, ranges) for phase, ranges in default.items()}
        if self._device == "cuda":
            torch.cuda.empty_cache()  # for the next problem, and finally for sizing caches by free memory
        return found

    def _ranges(self, problem: Problem, calls: Calls, phase: str, default: Sequence[tuple[int, str]]) -> list[list]:
        """Merges adjacent ranges with the same label."""
        found: list[list] = []
        for end, rows in self.sizes(phase):
            label = self._fastest(problem, calls, phase, end, rows, chosen_label(default, end))
            if found and found[-1][1] == label:
                found.pop()
            found.append([end, label])
        return found

    def sizes(self, phase: str) -> list[tuple[int, int]]:
        """(end of a range, rows measured for it). Rows are capped at those of the largest step."""
        tokens, seqs = self.config.max_num_batched_tokens, self.config.max_num_seqs
        if phase == PREFILL:
            return [(ANY, max(2, min(LARGE, tokens)))]
        most = seqs if phase == DECODE else min(LARGE, tokens)
        ends = [end for end in ROWS if end < most]
        return [*((end, end) for end in ends), (ANY, most)]

    def arguments(self, calls: Calls, phase: str, rows: int) -> Arguments:
        """What the candidates of a problem are called with."""
        return self.calls.arguments(calls.nodes, phase, rows)

    def _fastest(self, problem: Problem, calls: Calls, phase: str, end: int, rows: int, default: str) -> str:
        good = [c for c in calls.candidates if phase in c.phases and c.max_rows >= end]
        arguments = self.arguments(calls, phase, rows)
        seconds: dict[str, float] = {}
        for candidate in good:
            if candidate.label in calls.failed:
                continue
            try:
                seconds[candidate.label] = self._timer(candidate, arguments)
            except Exception as error:
                calls.failed.add(candidate.label)
                first = str(error).strip().partition("\n")[0]
                logger.warning("%s is not used for %s %s: %s: %s", candidate.label, problem.op, problem.shapes,
                               type(error).__name__, first)  # fmt: skip
        if not seconds:
            return default
        best = min(seconds, key=seconds.__getitem__)
        return best if seconds[best] < (1 - MIN_GAIN) * seconds.get(default, float("inf")) else default


def _problems(graph: fx.GraphModule, kernels: Kernels, is_invariant: bool) -> dict[Problem, Calls]:
    """Problems in graph order, only with constant weights, since measuring uses the real ones.

    Under batch invariance only ops without reductions: the kernel that reduces a row must not depend on their number.
    """
    nodes: dict[Problem, list[fx.Node]] = defaultdict(list)
    found: dict[Problem, list[Implementation]] = {}
    weights = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}  # not written while measured
    for node in graph.graph.nodes:
        op = op_of(node.target)
        if op is None or is_invariant and op.sums or not has_constants(node):
            continue
        call = OpCall.of(node, kernels.target, weights)
        of = kernels.candidates(call)
        problem = Problem(node.target._schema.name, describe(call), ", ".join(c.label for c in of))
        if len(of) > 1:
            nodes[problem].append(node)
            found[problem] = of
    return {problem: Calls(alike, found[problem]) for problem, alike in nodes.items()}


def cache_key(problems: Mapping[Problem, object], config: CompileConfig, target: Target) -> str:
    """Cache key: problems, kernels, libraries, device and sizes of steps."""
    sources = sorted(Path(kernel_files.__file__).parent.rglob("*.py"))
    native = sorted(Path(_C.__file__).parent.glob("*.so"))
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (*native, *sources)]
    gpu = torch.cuda.get_device_name() if target.device == "cuda" else ""
    packages = ("torch", "triton", "flash_attn", "flash_attn_3", "flashinfer-python")
    sizes = (config.max_num_batched_tokens, config.max_num_seqs)
    parts = (code, gpu, target.isa, [version_of(name) for name in packages], torch.version.cuda, sizes, list(problems))
    return hashlib.sha256(repr(parts).encode()).hexdigest()
