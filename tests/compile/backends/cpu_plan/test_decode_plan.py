"""Level 3: steps that only decode run on a plan of their own, bit for bit the one of every step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from paged_driver import greedy
from zoo import checkpoint, make_prompts

from fuseline.compile.backends.cpu_plan.steps import StepPlans
from fuseline.compile.cache.keys import optimized_key
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph_inputs import StepInputs, make_step
from fuseline.compile.report import explain
from fuseline.compile.target import detect_target

PROMPTS = make_prompts((3, 9, 20, 33))
NUM_TOKENS = 12


def build(family: str, dtype: str, level: int, **settings):
    config = CompileConfig(model=str(checkpoint(family, dtype)), level=level, **settings)
    return compile_model(config, detect_target(1))


def run_all(model) -> tuple[list[torch.Tensor], Counter]:
    """Logits of every step, and how many steps each plan ran."""
    logits, counts, run = [], Counter(), model.run
    plans = model._executable
    if isinstance(plans, StepPlans):
        for name in ("general", "decode"):
            getattr(plans, name).run = counted(counts, name, getattr(plans, name).run)

    def recorded(inputs):
        output = run(inputs)
        logits.append(output.logits.clone())
        return output

    model.run = recorded
    greedy(model, PROMPTS, NUM_TOKENS)
    return logits, counts


def counted(counts: Counter, name: str, run):
    def count(values):
        counts[name] += 1
        return run(values)

    return count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "deepseek_v3", "phi3_longrope", "cohere"])
def test_both_plans_give_the_same_bits(family: str, dtype: str) -> None:
    expected, _ = run_all(build(family, dtype, 1))
    found, counts = run_all(build(family, dtype, 3, disabled_passes=("cut_regions",)))
    assert counts["decode"] >= NUM_TOKENS - len(PROMPTS) and counts["general"] > 0
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_the_decode_plan_gathers_no_rows() -> None:
    text = explain(CompileConfig(str(checkpoint("llama", "bfloat16")), level=3))
    general, decode = (text[text.index(start) :].split("\n\n")[0] for start in ("\nplan: ", "\ndecode plan: "))
    assert "gather_rows" in general and "gather_rows" not in decode
    assert "decode plan" not in explain(CompileConfig(str(checkpoint("llama", "bfloat16")), level=2))


def inputs(counts: list[int], rows: list[int]) -> StepInputs:
    """Sequences of so many tokens, each in a block of its own; logits of `rows`."""
    blocks = torch.arange(1, len(counts) + 1)
    tokens = (7 * torch.arange(sum(counts)) + 3) % 128
    return make_step(counts, counts, blocks[None, :, None], 16, tokens, torch.tensor(rows))


@pytest.mark.parametrize(
    ("counts", "rows", "is_decode"),
    [
        ([1, 1, 1], [0, 1, 2], True),
        ([1], [0], True),
        ([1, 1, 1], [2, 0, 1], False),  # other rows first: prompt positions that are scored
        ([1, 1, 1], [0, 1], False),
        ([1, 1], [0, 1, 1], False),
        ([2, 1], [1, 2], False),
        ([2, 1], [0, 1, 2], False),
        ([1] * 9, list(range(9)), False),  # more sequences than the plan was made for
    ],
)
def test_counts_and_rows_pick_the_plan(counts: list[int], rows: list[int], is_decode: bool) -> None:
    model = build("llama", "float32", 3, max_num_seqs=8)
    model.allocate_caches([len(counts) + 1])
    ran = Counter()
    for name in ("general", "decode"):
        plan = getattr(model._executable, name)
        plan.run = counted(ran, name, plan.run)
    step = inputs(counts, rows)
    logits = model.run(step).logits.clone()
    assert ran == {"decode" if is_decode else "general": 1}
    all_rows = inputs(counts, list(range(sum(counts))))
    assert torch.equal(logits, build_general(model, all_rows)[step.logits_rows])


def build_general(model, step: StepInputs) -> torch.Tensor:
    """Logits of the step by the plan of every step."""
    model._executable = model._executable.general
    return model.run(step).logits


def test_levels_above_0_share_what_is_cached() -> None:
    keys = [optimized_key(CompileConfig(str(checkpoint("llama")), level=level)) for level in (0, 1, 2, 3)]
    assert keys[0] != keys[1] == keys[2] == keys[3]
