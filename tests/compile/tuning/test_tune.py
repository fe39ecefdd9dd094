"""Level 3 measures how products are cut once, keeps it, and no choice changes a bit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from levels_cases import NUM_TOKENS, PROMPTS
from paged_driver import greedy

from fuseline.compile.cache.files import CacheError
from fuseline.compile.compiler import compile_model, optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target
from fuseline.compile.tuning import linears as tune
from fuseline.compile.tuning import tuned
from fuseline.compile.tuning.linears import Product, tune_linears


@pytest.fixture
def config(tmp_path) -> CompileConfig:
    return CompileConfig(model=str(zoo.checkpoint("llama")), level=3, cache_dir=str(tmp_path / "cache"))


class Pretended:
    """Measures nothing: the choices of `fast` take half the time. Counts calls."""

    def __init__(self, fast: int = -1) -> None:
        self.fast, self.num_calls = fast, 0

    def __call__(self, product: Product, rows: int, choices) -> list[float]:
        self.num_calls += 1
        return [0.5 if choice & 0xFF == self.fast else 1.0 for choice in choices]


def tuned_choices(config: CompileConfig, measure) -> set[int]:
    """Choices that the nodes of the model get."""
    captured, _ = optimize(config)
    weights = {str(node.target): torch.empty(0) for node in captured.graph.graph.nodes if node.op == "get_attr"}
    tune_linears(captured.graph, weights, config, lambda *_: None, measure)
    linear = torch.ops.fuseline.linear_panels.default
    return {node.meta["choices"] for node in captured.graph.graph.find_nodes(op="call_function", target=linear)}


def stored(config: CompileConfig) -> list[Path]:
    return list(Path(config.cache_dir, "tuned").glob("*"))


def test_the_fastest_is_chosen_for_each_range_of_rows(config):
    assert tuned_choices(config, Pretended(fast=2)) == {0x0202020202}


def test_the_panels_of_a_chunk_are_chosen_after_those_of_a_tile(config):
    class Both(Pretended):
        def __call__(self, product, rows, choices):
            return [{2: 0.8, 2 | 8 << 2: 0.5}.get(choice & 0xFF, 1.0) for choice in choices]

    assert tuned_choices(config, Both()) == {int.from_bytes(bytes([2 | 8 << 2] * 5), "little")}


def test_what_is_hardly_faster_is_not_chosen(config):
    class Hardly(Pretended):
        def __call__(self, product, rows, choices):
            return [0.98 if choice & 0xFF == 2 else 1.0 for choice in choices]

    assert tuned_choices(config, Hardly()) == {0}


def test_rows_beyond_a_step_are_not_measured(config):
    assert tuned_choices(replace(config, max_num_batched_tokens=40), Pretended(fast=1)) == {0x010101}


def test_measured_once(config):
    first = tuned_choices(config, Pretended(fast=3))
    again = Pretended(fast=1)
    assert tuned_choices(config, again) == first and again.num_calls == 0
    assert len(stored(config)) == 1


@pytest.mark.parametrize("damage", [b"nonsense", b""])
def test_a_damaged_file_is_reported_and_measured_again(config, damage, caplog):
    tuned_choices(config, Pretended(fast=3))
    stored(config)[0].write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert tuned_choices(config, Pretended(fast=1)) == {0x0101010101}
    assert "it is measured again" in caplog.text


def test_choices_of_other_products_are_not_used(config):
    shape = next(iter(tune._nodes(optimize(config)[0].graph)))
    other = replace(shape, num_k=shape.num_k + 1)

    def parsed(problem, choice):
        return tuned.parse(tuned.body_of([(problem, choice)]), [shape], lambda _, choice: choice == 5)

    with pytest.raises(CacheError, match="other problems"):
        parsed(other, 5)
    with pytest.raises(CacheError, match="no choices"):
        parsed(shape, 6)
    assert parsed(shape, 5) == {shape: 5}


@pytest.mark.parametrize("fast", [1, 2 | 1 << 2, 3 | 16 << 2])
def test_no_choice_changes_a_token(config, fast, monkeypatch):
    plain = greedy(compile_model(replace(config, level=1), detect_target()), PROMPTS, NUM_TOKENS)
    monkeypatch.setattr(tune, "_choose", lambda *_: int.from_bytes(bytes([fast] * 5), "little"))
    model = compile_model(config, detect_target())
    assert greedy(model, PROMPTS, NUM_TOKENS) == plain
    assert len(stored(config)) == 1


def test_real_measurements_take_a_moment_and_are_told(config):
    told = []
    model = compile_model(config, detect_target(), lambda *progress: told.append(progress))
    assert [phase for phase, *_ in told].count("tuning") > 1
    assert stored(config) and greedy(model, PROMPTS, NUM_TOKENS)
