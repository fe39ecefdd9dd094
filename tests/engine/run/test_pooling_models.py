"""Pooled vectors of compiled models are those of Transformers' hidden states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_target_cases import build
from engine_walk_cases import Walk
from fake_gpu import FakeGpu
from zoo import checkpoint, load, make_prompts, truth

from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.target import detect_target
from fuseline.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from fuseline.engine.engine import Engine
from fuseline.engine.run.device import HostDevice, native_ops

NUM_BLOCKS = 32
PROMPTS = make_prompts((3, 20, 33))
KINDS = [(kind, normalize) for kind in ("last", "mean") for normalize in (False, True)]


def make_config(path: Path) -> EngineConfig:
    """Prompts are computed in chunks; means need the output of every token, of which a step has room for six."""
    return EngineConfig(
        CompileConfig(model=str(path)), cache=CacheConfig(num_gpu_blocks_override=NUM_BLOCKS),
        scheduler=SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=6),
    )  # fmt: skip


def cpu_engine(family: str, level: int, **settings: object) -> Engine:
    path = checkpoint(family)
    config = CompileConfig(model=str(path), level=level, gives_hidden=True, **settings)
    model = compile_model(config, detect_target(1))
    num_blocks = [NUM_BLOCKS] * len(model.info.cache_groups)
    model.allocate_caches([count + 1 for count in num_blocks])
    return Engine(make_config(path), model, num_blocks, HostDevice(native_ops()))


def gpu_engine(family: str, graphs: GraphConfig) -> Engine:
    model = build(family, "float32", graphs, gives_hidden=True)
    device = FakeGpu(model)
    model.allocate_caches([NUM_BLOCKS + 1])
    device.capture_graphs(model, lambda *progress: None)
    model.graphs.wait()
    return Engine(make_config(checkpoint(family)), model, [NUM_BLOCKS], device)


def expected_vector(states: torch.Tensor, kind: str, normalize: bool) -> np.ndarray:
    vector = (states[-1] if kind == "last" else states.mean(0)).numpy()
    return vector / np.linalg.norm(vector) if normalize else vector


def check_vectors(engine: Engine, path: Path) -> None:
    """Beside requests for tokens, whose answers stay."""
    walk, asked = Walk(engine), {}
    for prompt in PROMPTS:
        walk.submit(prompt, max_tokens=4, temperature=0.0)
        for kind in KINDS:
            asked[walk.pool(prompt, *kind)] = (prompt, *kind)
        walk.step()
    walk.finish()
    model = load(path)
    with torch.no_grad():
        states = {len(prompt): model.base_model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS}
    for name, (prompt, *kind) in asked.items():
        (output,) = walk.outputs[name, 0]
        assert output.finish_reason == "stop", output.error
        expected = expected_vector(states[len(prompt)], *kind)
        np.testing.assert_allclose(np.frombuffer(output.vector, np.float32), expected, rtol=1e-3, atol=1e-4)
    streams = [name for name in walk.requests if name not in asked]
    assert [walk.tokens(name) for name in streams] == truth(path, PROMPTS, 4)


@pytest.mark.parametrize(("family", "level"), [
    ("llama", 0), ("llama", 1), ("llama", 3), ("qwen3", 1), ("gemma2", 1), ("gpt2", 1), ("deepseek_v3", 1),
])  # fmt: skip
def test_vectors_are_those_of_transformers(family: str, level: int) -> None:
    check_vectors(cpu_engine(family, level), checkpoint(family))


def test_vectors_of_a_graph_that_computes_all_rows() -> None:
    check_vectors(cpu_engine("llama", 1, disabled_passes=("keep_last_logits",)), checkpoint("llama"))


@pytest.mark.parametrize("mixed_sizes", [(), (8, 16)], ids=["whole steps", "segments"])
def test_vectors_on_a_gpu(mixed_sizes: tuple[int, ...]) -> None:
    engine = gpu_engine("llama", GraphConfig((2, 4), mixed_sizes=mixed_sizes))
    with engine.runner.device.guard():
        check_vectors(engine, checkpoint("llama"))
    graphs = engine.runner.device.graphs
    assert graphs.replays and bool(graphs.segment_replays) == bool(mixed_sizes)


def test_a_model_that_was_not_asked_gives_none() -> None:
    info = compile_model(CompileConfig(model=str(checkpoint("llama"))), detect_target(1)).info
    assert info.hidden_dim == 0
