"""Level 2: the same greedy tokens, regions compiled or not, and a swap in the midst of a generation changes none."""

from __future__ import annotations

import logging
import sys
import threading

import pytest
from levels_cases import NUM_TOKENS, PROMPTS
from paged_driver import greedy
from zoo import checkpoint

from fuseline.compile.backends.inductor import regions as inductor
from fuseline.compile.backends.inductor.library import RegionFileError, check_file, seal
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import NEEDED_PASSES, PASSES, CompileConfig
from fuseline.compile.target import detect_target


def build(path, level: int, **settings):
    return compile_model(CompileConfig(model=str(path), level=level, **settings), detect_target())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "off"), [("cohere", ("find_norm",)), ("deepseek_v3", ("find_moe",))])
def test_levels_give_the_same_tokens_also_across_the_swap(family: str, off: tuple[str, ...], dtype: str) -> None:
    """Of models that have regions without one of their ops."""
    path = checkpoint(family, dtype)
    expected = greedy(build(path, 1, disabled_passes=off), PROMPTS, NUM_TOKENS)
    model = build(path, 2, disabled_passes=off)
    upgrade = model._upgrade
    steps, run = [0], model.run

    def run_and_swap(inputs):
        steps[0] += 1
        if steps[0] == 8:
            upgrade.join()
        return run(inputs)

    model.run = run_and_swap
    assert greedy(model, PROMPTS, NUM_TOKENS) == expected
    assert model._upgrade is None and model._executable is upgrade.result is not None
    assert greedy(model, PROMPTS, NUM_TOKENS) == expected


OFF = [name for name in PASSES if name not in NEEDED_PASSES]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    """Tokens with every pass, by family; made when asked for."""
    return {}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("name", OFF)
def test_each_pass_can_be_left_out(family: str, name: str, expected) -> None:
    path = checkpoint(family)
    if family not in expected:
        expected[family] = greedy(build(path, 1), PROMPTS, NUM_TOKENS)
    model = build(path, 1, disabled_passes=(name,))
    assert name not in [report.name for report in model.report.reports]
    assert greedy(model, PROMPTS, NUM_TOKENS) == expected[family]


def test_all_passes_that_can_be_left_out_together() -> None:
    path = checkpoint("llama")
    model = build(path, 1, disabled_passes=tuple(OFF))
    assert [report.name for report in model.report.reports] == ["page_attention", "page_state"]
    assert greedy(model, PROMPTS, NUM_TOKENS) == greedy(build(path, 1), PROMPTS, NUM_TOKENS)


def test_a_pass_that_the_level_has_not_can_be_named() -> None:
    path = checkpoint("llama")
    assert greedy(build(path, 0, disabled_passes=("join_linears",)), PROMPTS, 2) == greedy(build(path, 0), PROMPTS, 2)
    with pytest.raises(ValueError, match="there is no pass 'join'"):
        build(path, 0, disabled_passes=("join",))


def test_without_cut_regions_nothing_is_compiled() -> None:
    model = build(checkpoint("cohere"), 2, disabled_passes=("cut_regions", "find_norm"))
    assert model._executable.num_regions and model._upgrade is None


def test_a_model_without_regions_starts_no_compiler() -> None:
    model = build(checkpoint("llama"), 2)
    assert model._upgrade is None and not model.wait_compiled()


@pytest.mark.parametrize("command", [
    (sys.executable, "-c", "import sys; sys.exit(3)"),
    (sys.executable, "-c", "import time; time.sleep(60)"),
    ("/nonexistent/python",),
])  # fmt: skip
def test_a_compiler_that_fails_or_hangs_is_worked_around(command, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(inductor, "WORKER", command)
    monkeypatch.setattr(inductor, "REGION_SECONDS", 1.0)
    with caplog.at_level(logging.WARNING):
        assert inductor.compile_regions({"a": "{}"}, tmp_path, threading.Event()) == {}
    assert [r.message for r in caplog.records if "1 of 1 regions stay with eager torch" in r.message]


def test_damaged_and_foreign_artifacts_are_not_loaded(tmp_path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "x.so"
    seal(path, b"library")
    check_file(path)
    path.write_bytes(b"L" + path.read_bytes()[1:])
    with pytest.raises(RegionFileError, match="damaged"):
        check_file(path)
    seal(path, b"library")
    tmp_path.chmod(0o777)
    with pytest.raises(RegionFileError, match="other users"):
        check_file(path)
    assert inductor.load_kernels(["x"], tmp_path) == {}
