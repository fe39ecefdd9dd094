"""tools/gpu_check without a card: it says so, and its measurements run small through the interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_card import CARD, FakeCard, FakeGraphs

TOOL = Path(__file__).resolve().parent.parent / "tools" / "gpu_check"
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def tool(monkeypatch):
    """Its modules, imported as it does itself."""
    monkeypatch.syspath_prepend(str(TOOL))
    import kernels
    import llama
    import serving
    import table

    return kernels, llama, serving, table


def test_without_a_card_it_ends_with_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("gpu_check: error: torch ") and done.stderr.count("\n") == 1


def test_an_unknown_stage_is_named() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--only", "tests,paint"], capture_output=True, text=True)
    assert done.returncode == 2 and "there is no stage 'paint'" in done.stderr


def test_every_kernel_is_measured(tool) -> None:
    kernels, _, _, tables = tool
    sizes = kernels.Sizes(32, 64, 48, 4, 2, 16, (1, 2), 32, 130, 2, 4, 1 << 10, 16)
    found = tables.Table()
    limits = kernels.measure_limits(sizes, "cpu", tables.HostClock(), found)
    kernels.measure_kernels(sizes, "cpu", tables.HostClock(), limits, found)
    names = " ".join(row[0] for row in found.rows)
    for name in ("copy", "add_rms_norm", "act_mul", "rope_cache", "attention, decode 2", "prompt of 32", "greedy",
                 "top_k", "linear of 16 rows, ours", "linear_act_mul of 1 rows", "experts, 16 tokens"):  # fmt: skip
        assert name in names
    assert found.text("a card").count("\n") == 4 + len(found.rows)


def test_a_model_is_measured(tool, tmp_path) -> None:
    _, llama, serving, tables = tool
    load, found = llama.small(llama.Load()), tables.Table()
    runner = llama.Runner(tmp_path, CARD, load, llama.LLAMA_8B | SHAPE)
    llama.measure_model(runner, load, tables.Limits(1e9, 1e9), found, FakeGraphs())
    assert [row[0] for row in found.rows] == [
        "graphs of 1 of 1 sizes captured", "decode 1 x 20", "decode 1 x 20, host", "decode 2 x 20",
        "decode 2 x 20, host", "first token of 24",
    ]  # fmt: skip
    serving.measure_serving(runner, FakeCard(runner.model), serving.Batch(2, 6, 5, 8), found)
    names = [row[0] for row in found.rows[-3:]]
    assert names == ["engine, 2 x 6 in, 5 out", "engine, a decode step", "engine, card idle between decode steps"]


def test_tensors_are_carried_to_the_card_and_back_as_they_lie(tool) -> None:
    """Views of one storage stay views of one; what is written there is here afterwards."""
    import on_card

    whole = torch.arange(12.0).reshape(3, 4)
    carried = on_card.Carried("cpu")
    a, b, other = (carried.there(x) for x in (whole[1:, ::2], whole.T, 5))
    assert other == 5 and torch.equal(a, whole[1:, ::2]) and a.stride() == (4, 2)
    a.fill_(-1)
    assert torch.equal(b.T[1:, ::2], a) and whole[1, 0] == 4
    carried.back()
    assert (whole[1:, ::2] == -1).all() and whole[0, 0] == 0
