"""How many KV blocks there are: from the free memory, or as the user said."""

from __future__ import annotations

from dataclasses import dataclass

from fuseline.compile.specs import ModelInfo
from fuseline.engine.config import CacheConfig, SchedulerConfig

GIB = 1 << 30


class SizingError(ValueError):
    """The KV cache cannot hold one sequence; the message is one line that names the flags to change."""


@dataclass(frozen=True)
class CacheSize:
    num_blocks: tuple[int, ...]
    """Usable blocks per cache group; the caches get one more, the null block."""
    num_bytes: int
    table: tuple[tuple[str, str], ...]
    """Rows of the start-up table."""


@dataclass(frozen=True)
class _Group:
    block_bytes: int
    min_blocks: int
    """What one sequence of the full length needs."""
    max_blocks: int
    """More than this can never be in use; the rest would only hold old prefixes."""


def size_cache(
    info: ModelInfo, cache: CacheConfig, scheduler: SchedulerConfig, max_model_len: int, free_before: int, free_now: int
) -> CacheSize:
    """Blocks per group. `free_before` and `free_now`: free bytes before and after the model was loaded."""
    groups = [_group(info, index, cache, scheduler, max_model_len) for index in range(len(info.cache_groups))]
    budget = _budget(info, cache, free_before, free_now)
    if cache.num_gpu_blocks_override is not None:
        count = cache.num_gpu_blocks_override
        num_blocks = tuple(count for _ in groups)
    else:
        count = _largest_count(groups, budget)
        num_blocks = tuple(min(count, group.max_blocks) for group in groups)
    if any(count < group.min_blocks for group in groups):
        raise SizingError(_too_small(groups, count, budget, cache, max_model_len))
    num_bytes = sum((n + 1) * g.block_bytes for n, g in zip(num_blocks, groups, strict=True))
    rows = _table(info, cache, num_blocks, num_bytes, max_model_len, free_now)
    return CacheSize(num_blocks, num_bytes, rows)


def _group(info: ModelInfo, index: int, cache: CacheConfig, scheduler: SchedulerConfig, max_model_len: int) -> _Group:
    group = info.cache_groups[index]
    specs = {spec.layer: spec for spec in info.cache_specs}
    length = -(-max_model_len // cache.block_size)
    if group.window:
        seen = group.window - 1 + min(scheduler.max_num_batched_tokens, max_model_len)
        length = min(length, -(-seen // cache.block_size) + 1)
    block_bytes = cache.block_size * sum(specs[layer].bytes_per_token() for layer in group.layers)
    return _Group(block_bytes, length, length * scheduler.max_num_seqs)


def _budget(info: ModelInfo, cache: CacheConfig, free_before: int, free_now: int) -> int:
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes
    share = int(cache.gpu_memory_utilization * free_before) - info.weight_bytes - info.arena_bytes
    return max(0, min(share, int(cache.gpu_memory_utilization * free_now)))


def _largest_count(groups: list[_Group], budget: int) -> int:
    """Largest count with every group at min(count, its maximum), null blocks included, within the budget."""
    low, high = 0, max(group.max_blocks for group in groups)
    while low < high:
        middle = (low + high + 1) // 2
        need = sum((min(middle, group.max_blocks) + 1) * group.block_bytes for group in groups)
        low, high = (middle, high) if need <= budget else (low, middle - 1)
    return low


def _too_small(groups: list[_Group], count: int, budget: int, cache: CacheConfig, max_model_len: int) -> str:
    need_blocks = max(group.min_blocks for group in groups)
    need = sum((group.min_blocks + 1) * group.block_bytes for group in groups)
    if cache.num_gpu_blocks_override is not None:
        return (
            f"one sequence of {max_model_len} tokens needs {need_blocks} KV blocks but --num-gpu-blocks-override is "
            f"{count}; raise it or lower --max-model-len"
        )
    return (
        f"one sequence of {max_model_len} tokens needs {_gib(need)} of KV cache but {_gib(budget)} is available "
        f"({count} blocks of {cache.block_size} tokens); lower --max-model-len or --max-num-batched-tokens, or raise "
        "--gpu-memory-utilization or --kv-cache-memory-bytes"
    )


def _table(
    info: ModelInfo, cache: CacheConfig, num_blocks: tuple[int, ...], num_bytes: int, max_model_len: int, free: int
) -> tuple[tuple[str, str], ...]:
    blocks = " + ".join(str(count) for count in num_blocks)
    tokens = max(num_blocks) * cache.block_size
    on_host = (("weights on the host", _gib(info.host_weight_bytes)),) if info.host_weight_bytes else ()
    return (
        ("weights", _gib(info.weight_bytes)),
        *on_host,
        ("arena", _gib(info.arena_bytes)),
        ("KV cache", f"{_gib(num_bytes)}: {blocks} blocks of {cache.block_size} tokens"),
        ("KV capacity", f"{tokens} tokens, {tokens / max_model_len:.1f} sequences of {max_model_len}"),
        ("free memory left", _gib(max(0, free - num_bytes))),
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / (1 << 20):.1f} MiB"
