"""The sweep over Transformers' architectures: one of each kind of outcome, its processes, and its page."""

from __future__ import annotations

import os
import re
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from sweep_architectures import trial
from sweep_architectures.architectures import all_types
from sweep_architectures.compare import Difference, check_bfloat16, check_float32, lost_token
from sweep_architectures.page import PAGE, page
from sweep_architectures.processes import Limits, run_all
from sweep_architectures.results import OURS, Result, append, read

EQUAL = ("gpt2", "gpt_oss", "gemma2", "olmo_hybrid", "bamba", "mamba")
"""Together they have every op of a captured graph."""
REFUSED = {
    "bart": "^bart would answer wrongly: .* because it counts positions from the first token of each step ",
    "deepseek_v4": "^deepseek_v4 has layers of type .*, which are not supported$",
    "big_bird": "its code depends on the number of tokens$",
    # Its config takes no other number of layers than its own, so its copy has as many.
    "zamba": "^zamba would answer wrongly: .* from token 1 on, ",
    "trocr": "^trocr: in 3 of 3 layers its attention does not go through Transformers' attention interface",
}
OPS = {
    "attention", "experts", "causal_conv", "gated_delta", "ssd_scan", "selective_scan", "rms_norm", "layer_norm",
    "rope", "linear", "route_topk",
}  # fmt: skip
LIMITS = Limits(jobs=2, seconds=5, memory=16 << 30)


@pytest.fixture(scope="module")
def ops() -> Counter:
    """Ops of all stages of the models that were served."""
    return Counter()


@pytest.mark.parametrize("model_type", EQUAL)
def test_a_served_model_is_equal(model_type: str, tmp_path: Path, monkeypatch, ops: Counter) -> None:
    def compile_model(*arguments: object) -> object:
        model = original(*arguments)
        ops.update(name for counts in model.report.stage_ops.values() for name in counts)
        return model

    original = trial.compile_model
    monkeypatch.setattr(trial, "compile_model", compile_model)
    result = trial.try_model(model_type, tmp_path, level=1)
    assert result.kind == "equal", result.detail
    assert result.speed


def test_served_models_have_every_op(ops: Counter) -> None:
    assert OPS <= ops.keys()


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refused_model_is_refused_in_words(model_type: str, tmp_path: Path) -> None:
    result = trial.try_model(model_type, tmp_path, level=1)
    assert result.kind == "refused", result.detail
    assert re.search(REFUSED[model_type], result.detail)


def rows_of(seed: int) -> torch.Tensor:
    return torch.randn(7, 50, generator=torch.Generator().manual_seed(seed))


def test_ties_do_not_count() -> None:
    logits = torch.zeros(2, 4) + torch.tensor([0.0, 1.0, 2.0, 2.01])
    assert lost_token(logits, torch.tensor([3, 2]), 0.02) == ""
    assert lost_token(logits, torch.tensor([3, 2]), 0.005).startswith("token 1 is not the highest, by 0.01")
    assert lost_token(logits, torch.tensor([1, 3]), 0.02).startswith("token 0 ")


def test_what_rounding_does_not_explain_is_a_difference() -> None:
    exact, noise = rows_of(1), 0.01 * rows_of(2)
    assert check_float32([exact], [exact], [1e-3]) == "float32 0e+00"
    check_float32([exact + noise], [exact], [0.1])
    with pytest.raises(Difference, match="an error of"):
        check_float32([exact + noise], [exact], [1e-3])
    check_bfloat16([exact - noise], [exact + noise], [exact])
    with pytest.raises(Difference, match="median error"):
        check_bfloat16([exact + 5 * noise], [exact + noise], [exact])
    lost = exact.clone()
    lost[3, exact[3].argmin()] = exact[3].amax() + 1
    with pytest.raises(Difference, match="token 3 is not the highest"):
        check_bfloat16([lost], [exact + noise], [exact])
    with pytest.raises(Difference):
        check_float32([exact * torch.nan], [exact], [0.1])
    with pytest.raises(Difference):
        check_bfloat16([exact * torch.nan], [exact + noise], [exact])


def _behave(name: str, folder: Path, level: int) -> Result:
    if name == "dies":
        os._exit(3)
    if name == "computes":
        while True:
            pass
    if name == "allocates":
        try:
            bytearray(32 << 30)
        except MemoryError:
            return Result(name, "none", "no memory")
    return Result(name, "equal", str(level), speed=OURS)


def test_no_architecture_ends_the_sweep(tmp_path: Path) -> None:
    names = ["dies", "computes", "allocates", "works"]
    limits = Limits(jobs=2, seconds=1, memory=16 << 30)
    found = {result.model_type: result for result in run_all(_behave, names, tmp_path, 1, limits)}
    assert found.keys() == set(names)
    assert found["dies"].kind == found["computes"].kind == "crash"
    assert "status 3" in found["dies"].detail and "1 s of CPU time" in found["computes"].detail
    assert found["allocates"].detail == "no memory" and found["works"].kind == "equal"
    assert not any(tmp_path.iterdir())


def test_a_hanging_architecture_is_ended(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sweep_architectures.processes.IDLE", 1)
    (result,) = run_all(lambda *_: time.sleep(60), ["hangs"], tmp_path, 1, Limits(1, 1, 16 << 30))
    assert result.kind == "crash" and "not done after 1 s" in result.detail


def test_results_are_kept(tmp_path: Path) -> None:
    path, result = tmp_path / "results", Result("a", "refused", "a | b", False, "", 2.5)
    assert read(path) == {}
    append(path, result)
    assert read(path) == {"a": result}


def test_the_page_counts_and_names_reasons() -> None:
    text = page([Result("a", "equal", "", True, OURS), Result("b", "refused", "no | way"), Result("c", "none", "why")])
    assert "| text decoders | 2 |" in text and "| equal | 1 |" in text
    assert "| `a` | equal | all ours |  |" in text
    assert "| `b` | refused |  | no \\| way |" in text
    assert "| `c` | not tried |  | why |" in text


def test_the_page_is_that_of_the_installed_transformers() -> None:
    """Or of another one, which is then named."""
    text = PAGE.read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", text, re.M))
    if f"Transformers {transformers.__version__} " in text:
        assert rows.keys() == set(all_types())
    assert "llama" in rows and "equal" in rows.values()
