"""Reported measurements, defined as in `vllm bench serve`.

TTFT: sending to the first chunk with text. ITL: between such chunks. TPOT: (E2E - TTFT) / (output tokens - 1).
E2E: sending to the end of the stream. A request waits for a free place (--max-concurrency) before it is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

PERCENTILES = (50, 90, 99)
METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}


@dataclass
class Outcome:
    """One finished request; times in seconds. `error` is empty on success."""

    input_len: int
    output_len: int = 0
    ttft: float = 0.0
    latency: float = 0.0
    itls: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def tpot(self) -> float | None:
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between closest ranks of sorted values; 0 of none."""
    if not ordered:
        return 0.0
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(outcomes: Sequence[Outcome], duration: float) -> dict[str, float]:
    """Totals, throughputs and latencies (milliseconds) of a run that took `duration` seconds."""
    done = [outcome for outcome in outcomes if not outcome.error]
    inputs, outputs = sum(item.input_len for item in done), sum(item.output_len for item in done)
    result: dict[str, float] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
    }
    for name, values in latencies(outcomes).items():
        result |= _statistics(name, values)
    return result


def latencies(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Milliseconds of the requests that succeeded, by the names of METRICS, sorted."""
    done = [outcome for outcome in outcomes if not outcome.error]
    seconds = {
        "ttft": [item.ttft for item in done if item.ttft],
        "tpot": [item.tpot for item in done if item.tpot is not None],
        "itl": [gap for item in done for gap in item.itls],
        "e2el": [item.latency for item in done],
    }
    return {name: sorted(value * 1000 for value in values) for name, values in seconds.items()}


def _statistics(name: str, ordered: list[float]) -> dict[str, float]:
    row = {f"mean_{name}_ms": sum(ordered) / len(ordered) if ordered else 0.0}
    row |= {f"p{percent}_{name}_ms": percentile(ordered, percent) for percent in PERCENTILES}
    return row | {f"median_{name}_ms": row[f"p50_{name}_ms"]}


def report(result: dict[str, float]) -> str:
    """The table printed at the end."""
    lines = [
        f"{'requests':<32}{result['completed']:>12} done, {result['failed']} failed",
        f"{'duration':<32}{result['duration']:>12.2f} s",
        f"{'input tokens':<32}{result['total_input_tokens']:>12}",
        f"{'output tokens':<32}{result['total_output_tokens']:>12}",
        f"{'request throughput':<32}{result['request_throughput']:>12.2f} request/s",
        f"{'output throughput':<32}{result['output_throughput']:>12.2f} token/s",
        f"{'total throughput':<32}{result['total_token_throughput']:>12.2f} token/s",
        "",
        f"{'milliseconds':<32}{'mean':>12}" + "".join(f"{f'p{percent}':>12}" for percent in PERCENTILES),
    ]
    for name, title in METRICS.items():
        cells = [result[f"mean_{name}_ms"], *(result[f"p{percent}_{name}_ms"] for percent in PERCENTILES)]
        lines.append(f"{f'{title} ({name})':<32}" + "".join(f"{cell:>12.2f}" for cell in cells))
    return "\n".join(lines)
