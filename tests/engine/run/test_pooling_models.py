"""Pooled vectors of compiled models are those of Transformers' hidden states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_walk_cases import Walk
from real_engine import cpu_engine, gpu_engine
from zoo import checkpoint, load, make_prompts, truth

from fuseline.compile.config import GraphConfig
from fuseline.engine.engine import Engine

NUM_TOKENS = 6
PROMPTS = make_prompts((3, 20, 33))
KINDS = [(kind, normalize) for kind in ("last", "mean") for normalize in (False, True)]


def expected_vector(states: torch.Tensor, kind: str, normalize: bool) -> np.ndarray:
    vector = (states[-1] if kind == "last" else states.mean(0)).numpy()
    return vector / np.linalg.norm(vector) if normalize else vector


def check_vectors(engine: Engine, path: Path, prompts: list[list[int]] = PROMPTS, kinds: list[tuple] = KINDS) -> None:
    """In chunks, beside requests for tokens, whose answers stay; a step has room for the outputs of six tokens."""
    walk, asked = Walk(engine), {}
    for prompt in prompts:
        walk.submit(prompt, max_tokens=NUM_TOKENS, temperature=0.0)
        for kind in kinds:
            asked[walk.pool(prompt, *kind)] = (prompt, *kind)
        walk.step()
    walk.finish()
    model = load(path)
    with torch.no_grad():
        states = {len(prompt): model.base_model(torch.tensor([prompt])).last_hidden_state[0] for prompt in prompts}
    for name, (prompt, *kind) in asked.items():
        (output,) = walk.outputs[name, 0]
        assert output.finish_reason == "stop", output.error
        expected = expected_vector(states[len(prompt)], *kind)
        np.testing.assert_allclose(np.frombuffer(output.vector, np.float32), expected, rtol=1e-3, atol=1e-4)
    streams = [name for name in walk.requests if name not in asked]
    assert [walk.tokens(name) for name in streams] == truth(path, prompts, NUM_TOKENS)


@pytest.mark.parametrize(("family", "level"), [
    ("llama", 0), ("llama", 1), ("llama", 3), ("qwen3", 1), ("gemma2", 1), ("gpt2", 1), ("deepseek_v3", 1),
])  # fmt: skip
def test_vectors_are_those_of_transformers(family: str, level: int) -> None:
    check_vectors(cpu_engine(family, level=level, gives_hidden=True), checkpoint(family))


def test_vectors_of_a_graph_that_computes_all_rows() -> None:
    engine = cpu_engine("llama", gives_hidden=True, disabled_passes=("keep_last_logits",))
    check_vectors(engine, checkpoint("llama"))


def test_vectors_on_a_gpu() -> None:
    """From steps replayed in segments, and whole."""
    engine = gpu_engine("llama", GraphConfig((2,), mixed_sizes=(16,)), gives_hidden=True)
    model = engine.runner.model
    with engine.runner.device.guard():
        check_vectors(engine, checkpoint("llama"), make_prompts((9,)), [("mean", True), ("last", False)])
    graphs = engine.runner.device.graphs
    assert graphs.replays and graphs.segment_replays
    assert {len(graph.results) for graph in model.graphs.decode.captured.values()} == {2}


def test_a_model_that_was_not_asked_gives_none() -> None:
    walk = Walk(cpu_engine("llama"))
    name = walk.pool(PROMPTS[0])
    walk.finish()
    (output,) = walk.outputs[name, 0]
    assert output.is_bad_request and output.error == "this model gives no pooled vectors"
