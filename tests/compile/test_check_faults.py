"""The model check finds faults of any layer below capture, and tells what its small copy does not cover."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo

from fuseline.compile import check, compiler
from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.compiler import optimize
from fuseline.compile.config import CompileConfig

OPS = torch.ops.fuseline


@pytest.fixture
def llama(tmp_path: Path) -> CompileConfig:
    """A config alone, which is all that a check needs."""
    zoo.config_of("llama").save_pretrained(tmp_path / "model")
    return CompileConfig(str(tmp_path / "model"), cache_dir=str(tmp_path / "cache"))


def window(node: torch.fx.Node) -> tuple:
    return (*node.args[:7], 7, *node.args[8:])


def scale(node: torch.fx.Node) -> tuple:
    return (*node.args[:8], 1.01 * node.args[8], *node.args[9:])


def epsilon(node: torch.fx.Node) -> tuple:
    return (*node.args[:2], 0.5, *node.args[3:])


@pytest.mark.parametrize(
    "op, args_of", [("paged_attention", window), ("paged_attention", scale), ("rms_norm", epsilon)],
    ids=["window", "scale", "epsilon"],
)
def test_a_serving_graph_that_computes_something_else_is_refused(llama, monkeypatch, op: str, args_of) -> None:
    run_passes = compiler._run_passes

    def faulty(captured, config, target):
        result = run_passes(captured, config, target)
        nodes = captured.graph.graph.find_nodes(op="call_function", target=getattr(OPS, op).default)
        assert nodes
        for node in nodes:
            node.args = args_of(node)
        return result

    monkeypatch.setattr(compiler, "_run_passes", faulty)
    with pytest.raises(CaptureError, match=r"llama would answer wrongly.*from token \d+ on.*--skip-model-check"):
        optimize(llama)


def test_the_verdict_holds_for_one_compiler(llama, monkeypatch) -> None:
    asked = []
    optimize(llama)
    monkeypatch.setattr(compiler, "check_model", lambda *args: pytest.fail("checked again"))
    assert optimize(llama)[0].verdict.startswith("checked")
    monkeypatch.setattr("fuseline.compile.capture.artifact.sources_key", lambda: "other")
    monkeypatch.setattr(compiler, "check_model", lambda *args: asked.append(args) or "checked: again")
    assert optimize(llama)[0].verdict == "checked: again" and len(asked) == 1


def test_ops_that_the_copy_lacks_are_told(llama, monkeypatch, caplog) -> None:
    ops, asked = check._ops, []

    def first_has_more(captured):
        asked.append(captured)
        return ops(captured) | ({"aten.cumsum.default"} if len(asked) == 1 else set())

    monkeypatch.setattr(check, "_ops", first_has_more)
    assert optimize(llama)[0].verdict.endswith("; not covered: aten.cumsum.default")
    assert "does not cover aten.cumsum.default" in caplog.text


@pytest.mark.parametrize("nudge, allowed", [(1e-6, check.MAX_ERROR), (1e-3, 1e-2), (1e-1, check.MOST_ERROR)])
def test_what_rounding_explains_has_bounds(nudge: float, allowed: float) -> None:
    """However sensitive a model is, a graph that lacks something is not passed as rounding."""
    expected = torch.tensor([[-1.0, 0.0, 1.0]])  # of standard deviation 1

    class Nudged:
        def nudged_logits(self, tokens: torch.Tensor) -> torch.Tensor:
            return expected + torch.tensor([0.0, nudge, 0.0])

    assert check.allowed_error(Nudged(), torch.tensor([0]), expected) == pytest.approx(allowed)
