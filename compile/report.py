"""Output of `fuseline explain MODEL`: stages, passes with matches and times, op tables, the final graph."""

from __future__ import annotations

from collections import Counter

from fuseline.compile.backends.cpu_plan.lowering import Call
from fuseline.compile.backends.cpu_plan.steps import StepKind, step_kinds
from fuseline.compile.capture.errors import CaptureError, told_as
from fuseline.compile.compiler import optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.region import Region
from fuseline.compile.graph.runner import PipelineResult
from fuseline.compile.graph.show import show


def explain(config: CompileConfig) -> str:
    """Needs no weights. If the model cannot be captured, returns the reason."""
    try:
        captured, result = optimize(config)
        with told_as(CaptureError, "its graph cannot be lowered"):
            kinds = step_kinds(captured.graph, config) if config.level > 0 else ()
    except CaptureError as error:
        return f"this model cannot be served: {error}"
    parts = [
        f"{captured.facts.model_type}, {str(captured.dtype).removeprefix('torch.')}, level {config.level}",
        f"model check: {captured.verdict or 'skipped'}",
        _passes(result),
        *(_ops(f"ops after {stage}", counts) for stage, counts in result.stage_ops.items()),
    ]
    parts += [_plan(name, kind) for name, kind in zip(("plan", "decode plan"), kinds, strict=False)]
    return "\n\n".join([*parts, "graph", show(captured.graph)])


def _passes(result: PipelineResult) -> str:
    rows = [("stage", "pass", "matches", "ms", "ops")]
    rows += [
        (r.stage, r.name, str(r.matches), f"{1000 * r.seconds:.1f}", f"{r.ops_before} -> {r.ops_after}")
        for r in result.reports
    ]
    return table(rows)


def _ops(title: str, counts: Counter) -> str:
    return title + "\n" + table([(name, str(count)) for name, count in counts.most_common()])


def _plan(name: str, kind: StepKind) -> str:
    lowered = kind.lower()
    calls = Counter(step.native.kernel for step in lowered.steps if isinstance(step, Call))
    regions = [step for step in lowered.steps if isinstance(step, Region)]
    text = _ops(f"{name}: {sum(calls.values())} kernel calls, {len(regions)} regions computed by torch", calls)
    for k, region in enumerate(regions[:20]):
        text += f"\nregion {k}: " + ", ".join(str(node.target) for node in region.nodes)
    return text


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join("  " + line for line in lines)
