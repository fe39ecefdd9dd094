"""A picture of one run: the distribution of each latency."""

from __future__ import annotations

from collections.abc import Sequence

from fuseline.api.bench.measure import METRICS, Outcome, latencies
from fuseline.api.config import ConfigError


def require_matplotlib() -> None:
    """Raise ConfigError when --plot cannot work, before any load is made."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'fuseline[plot]'") from error


def save_plot(path: str, outcomes: Sequence[Outcome], title: str) -> None:
    """Write a PNG with the cumulative distribution of TTFT, TPOT, ITL and E2E in milliseconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, ordered) in zip(figure.subplots(2, 2).flat, latencies(outcomes).items(), strict=True):
        axes.step(ordered, [(index + 1) / len(ordered) for index in range(len(ordered))], where="post")
        axes.set(title=METRICS[name], xlabel="ms", ylabel="share of samples", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
