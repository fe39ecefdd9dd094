"""Engines over compiled models of the zoo, on this CPU or on a GPU that is none."""

from __future__ import annotations

from cuda_target_cases import build
from fake_gpu import FakeGpu
from zoo import checkpoint

from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.target import detect_target
from fuseline.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from fuseline.engine.engine import Engine
from fuseline.engine.run.device import HostDevice, native_ops

NUM_BLOCKS = 32


def make_config(family: str, dtype: str = "float32") -> EngineConfig:
    """Steps of up to 16 tokens and 6 sequences, so longer prompts are computed in chunks."""
    return EngineConfig(
        CompileConfig(model=str(checkpoint(family, dtype))), cache=CacheConfig(num_gpu_blocks_override=NUM_BLOCKS),
        scheduler=SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=6),
    )  # fmt: skip


def cpu_engine(family: str, dtype: str = "float32", **settings: object) -> Engine:
    config = make_config(family, dtype)
    model = compile_model(CompileConfig(model=config.compile.model, **settings), detect_target(1))
    num_blocks = [NUM_BLOCKS] * len(model.info.cache_groups)
    model.allocate_caches([count + 1 for count in num_blocks])
    return Engine(config, model, num_blocks, HostDevice(native_ops()))


def gpu_engine(family: str, graphs: GraphConfig, **settings: object) -> Engine:
    """All graphs are captured."""
    model = build(family, "float32", graphs, **settings)
    device = FakeGpu(model)
    model.allocate_caches([NUM_BLOCKS + 1])
    device.capture_graphs(model, lambda *progress: None)
    model.graphs.wait()
    return Engine(make_config(family), model, [NUM_BLOCKS], device)
