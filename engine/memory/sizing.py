"""How many KV blocks there are: from the free memory, or as the user said."""

from __future__ import annotations

from dataclasses import dataclass

from fuseline.compile.specs import ModelInfo
from fuseline.engine.config import CacheConfig, SchedulerConfig

GIB = 1 << 30


class SizingError(ValueError):
    """The KV cache cannot hold one sequence; the message is one line that names the flags to change."""


@dataclass(frozen=True)
class Memory:
    """Of a device, in bytes."""

    free: int
    total: int


@dataclass(frozen=True)
class StepMemory:
    """What is to stay free on a card beside weights and caches, in bytes."""

    peak: int
    """What a step takes at most, sampling included."""
    graphs: int


@dataclass(frozen=True)
class Room:
    """Memory for the KV cache once the model is loaded, in bytes; what else there is of it for the start-up table."""

    num_bytes: int
    free: int
    rows: tuple[tuple[str, int], ...]


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


def room_on_host(info: ModelInfo, share: float, before: Memory, now: Memory) -> Room:
    """`share` of the memory that was free before the model was loaded."""
    left = int(share * before.free) - info.weight_bytes - info.arena_bytes
    rows = ("weights", info.weight_bytes), ("arena", info.arena_bytes)
    return Room(max(0, min(left, int(share * now.free))), now.free, rows)


def room_on_card(info: ModelInfo, share: float, before: Memory, now: Memory, steps: StepMemory) -> Room:
    """`share` of the card's memory, others' use of it apart: whatever is gone since `before` is this server's."""
    needed = steps.peak + steps.graphs
    left = int(share * before.total) - (before.free - now.free) - needed
    on_host = (("weights on the host", info.host_weight_bytes),) if info.host_weight_bytes else ()
    rows = ("weights", info.weight_bytes), *on_host, ("a step at most", steps.peak), ("kept for graphs", steps.graphs)
    return Room(max(0, min(left, now.free - needed)), now.free - needed, rows)


def size_cache(
    info: ModelInfo, cache: CacheConfig, scheduler: SchedulerConfig, max_model_len: int, room: Room
) -> CacheSize:  # fmt: skip
    """Blocks per group."""
    groups = [_group(info, index, cache, scheduler, max_model_len) for index in range(len(info.cache_groups))]
    budget = room.num_bytes if cache.kv_cache_memory_bytes is None else cache.kv_cache_memory_bytes
    if cache.num_gpu_blocks_override is not None:
        count = cache.num_gpu_blocks_override
        num_blocks = tuple(count for _ in groups)
    else:
        count = _largest_count(groups, budget)
        num_blocks = tuple(min(count, group.max_blocks) for group in groups)
    if any(count < group.min_blocks for group in groups):
        raise SizingError(_too_small(groups, count, budget, cache, max_model_len))
    num_bytes = sum((n + 1) * g.block_bytes for n, g in zip(num_blocks, groups, strict=True))
    rows = _table(cache, num_blocks, num_bytes, max_model_len, room)
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
    cache: CacheConfig, num_blocks: tuple[int, ...], num_bytes: int, max_model_len: int, room: Room
) -> tuple[tuple[str, str], ...]:
    blocks = " + ".join(str(count) for count in num_blocks)
    tokens = max(num_blocks) * cache.block_size
    return (
        *((label, _gib(num)) for label, num in room.rows),
        ("KV cache", f"{_gib(num_bytes)}: {blocks} blocks of {cache.block_size} tokens"),
        ("KV capacity", f"{tokens} tokens, {tokens / max_model_len:.1f} sequences of {max_model_len}"),
        ("free memory left", _gib(max(0, room.free - num_bytes))),
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / (1 << 20):.1f} MiB"
