"""KV caches take memory when they are written, not when they are allocated."""

from __future__ import annotations

import psutil
from zoo import checkpoint

from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target


def test_a_large_cache_is_not_touched() -> None:
    model = compile_model(CompileConfig(model=str(checkpoint("llama", "float32"))), detect_target())
    spec = model.info.cache_specs[0]
    block_bytes = 16 * spec.num_kv_heads * (spec.key_dim + spec.value_dim) * 4 * len(model.info.cache_specs)
    before = psutil.Process().memory_info().rss
    model.allocate_caches([4 * 2**30 // block_bytes] * len(model.info.cache_groups))
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
