"""Configs, candidates and a fake clock for tests of tuning on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import pytest
import torch
import zoo
from fake_gpu import GPU

from fuseline.compile.compiler import optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.kernels.registry import Implementation
from fuseline.compile.kernels.select import Kernels
from fuseline.compile.tuning.kernels import tune_kernels
from fuseline.compile.tuning.timer import Arguments

OURS = "triton.paged_attention"


@pytest.fixture
def config(tmp_path) -> CompileConfig:
    return CompileConfig(
        model=str(zoo.checkpoint("llama", "bfloat16")), level=3, cache_dir=str(tmp_path / "cache"), max_num_seqs=20,
        max_num_batched_tokens=300,
    )  # fmt: skip


def candidate(label: str, run: Callable, **more: object) -> Implementation:
    return Implementation("op", label, "cuda", run, **more)


class Clock:
    """A timer that returns `seconds` of (label, rows), 1 where there are none, and counts measurements."""

    def __init__(self, seconds: Callable[[str, int], float | None] = lambda label, rows: None) -> None:
        self.seconds = seconds
        self.seen: list[tuple[str, int]] = []

    def __call__(self, candidate: Implementation, arguments: Arguments) -> float:
        args = arguments.calls[0]
        args = args[1:] if isinstance(args[0], int) else args  # of runs of ops: which of them
        is_write = candidate.label.endswith("_cache") or "rope_cache" in candidate.label
        first = args[2] if is_write else args[0]  # x[..., K], or heads [1, H, T, D]
        rows = first.shape[2] if first.dim() == 4 else first.numel() // first.shape[-1]
        self.seen.append((candidate.label, rows))
        return self.seconds(candidate.label, rows) or 1.0


def choices(
    config: CompileConfig, clock: Clock, libraries: Mapping[str, object] = MappingProxyType({})
) -> dict[str, list[dict]]:
    """By op, in the graph's order."""
    captured, _ = optimize(config, GPU)
    constants = [node for node in captured.graph.graph.nodes if node.op == "get_attr"]
    weights = {
        str(node.target): torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype) for node in constants
    }
    tune_kernels(captured.graph, weights, config, GPU, lambda *_: None, clock, Kernels(GPU, libraries))
    found: dict[str, list[dict]] = {}
    for node in captured.graph.graph.nodes:
        if "choices" in node.meta:
            found.setdefault(node.target._schema.name.split("::")[1], []).append(node.meta["choices"])
    return found
