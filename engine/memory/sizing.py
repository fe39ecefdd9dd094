"""How many KV blocks there are: from the free memory, or as the user said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuseline.compile.specs import CacheGroup, ModelInfo
from fuseline.engine.config import CacheConfig, EngineConfig, SchedulerConfig

GIB = 1 << 30
MAX_SNAPSHOTS = 4
"""Snapshots of recurrent states for each sequence that may run: more would only hold old prefixes."""


class SizingError(ValueError):
    """The KV cache cannot hold one sequence; the message is one line that names the flags to change."""


@dataclass(frozen=True)
class Memory:
    """Memory of a device, in bytes."""

    free: int
    total: int


@dataclass(frozen=True)
class ProfiledMemory:
    """Memory that a profile run has shown to be needed on a GPU beside weights and caches, in bytes."""

    activation_peak: int
    """Most that a step takes, sampling included."""
    graphs: int


@dataclass(frozen=True)
class KVBudget:
    """Memory for the caches once the model is loaded, in bytes, and other rows of the start-up table."""

    num_bytes: int
    free: int
    rows: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class CacheSize:
    num_blocks: tuple[int, ...]
    """Usable blocks per cache group; the caches get one more, the null block."""
    num_bytes: int
    """KV blocks, recurrent states and their snapshots."""
    table: tuple[tuple[str, str], ...]
    """Rows of the start-up table."""
    num_states: int = 0
    """Slots of recurrent states, those of snapshots included; 0 for a model without."""


@dataclass(frozen=True)
class _States:
    """Slots of recurrent states."""

    size: int = 0
    """Bytes of one."""
    num_running: int = 0
    num_snapshots: int = 0
    """Slots beyond those of running sequences."""

    @property
    def num_bytes(self) -> int:
        return (self.num_running + self.num_snapshots) * self.size

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Of the start-up table."""
        kinds = (
            ("recurrent states", self.num_running, "sequences"),
            ("state snapshots", self.num_snapshots, "prefixes, more in states that no sequence uses"),
        )
        return tuple((label, f"{_gib(num * self.size)}: {num} {what}") for label, num, what in kinds if num)


@dataclass(frozen=True)
class _Group:
    block_bytes: int
    min_blocks: int
    """Blocks that one sequence of the full length needs."""
    max_blocks: int
    """More than this can never be in use; the rest would only hold old prefixes."""


def kv_budget_on_host(info: ModelInfo, share: float, before: Memory, now: Memory) -> KVBudget:
    """`share` of the memory that was free before the model was loaded."""
    left = int(share * before.free) - info.weight_bytes - info.arena_bytes
    rows = ("weights", info.weight_bytes), ("arena", info.arena_bytes)
    return KVBudget(max(0, min(left, int(share * now.free))), now.free, rows)


def kv_budget_on_gpu(info: ModelInfo, share: float, before: Memory, now: Memory, profiled: ProfiledMemory) -> KVBudget:
    """`share` of the GPU's memory, others' use of it apart: whatever is gone since `before` is this server's."""
    needed = profiled.activation_peak + profiled.graphs
    left = int(share * before.total) - (before.free - now.free) - needed
    on_host = (("weights on the host", info.host_weight_bytes),) if info.host_weight_bytes else ()
    rows = (
        ("weights", info.weight_bytes),
        *on_host,
        ("a step at most", profiled.activation_peak),
        ("kept for graphs", profiled.graphs),
    )
    return KVBudget(max(0, min(left, now.free - needed)), now.free - needed, rows)


def check_override(config: EngineConfig, groups: Sequence[CacheGroup], max_model_len: int) -> None:
    """Whether --num-gpu-blocks-override holds one sequence, which no weight is needed for. Raises SizingError."""
    cache, count = config.cache, config.cache.num_gpu_blocks_override
    if count is None or cache.fits_context:
        return
    needed = max((_blocks_of(group, cache, config.scheduler, max_model_len) for group in groups), default=0)
    if count < needed:
        raise SizingError(_too_few(needed, count, max_model_len))


def size_cache(
    info: ModelInfo, cache: CacheConfig, scheduler: SchedulerConfig, max_model_len: int, budget: KVBudget
) -> CacheSize:
    """Slots of recurrent states for as many sequences as may run and fit, then those of snapshots, then blocks per
    group. Raises SizingError.
    """
    groups = [_group(info, index, cache, scheduler, max_model_len) for index in range(len(info.cache_groups))]
    num_bytes = budget.num_bytes if cache.kv_cache_memory_bytes is None else cache.kv_cache_memory_bytes
    states = _size_states(info, cache, scheduler, num_bytes, groups)
    left = num_bytes - states.num_bytes
    if cache.num_gpu_blocks_override is not None:
        count = cache.num_gpu_blocks_override
        num_blocks = tuple(count for _ in groups)
    else:
        count = _largest_count(groups, left)
        num_blocks = tuple(min(count, group.max_blocks) for group in groups)
    if any(count < group.min_blocks for group in groups):
        raise SizingError(_too_small(groups, count, left, cache, max_model_len))
    kv_bytes = sum((n + 1) * g.block_bytes for n, g in zip(num_blocks, groups, strict=True))
    used = kv_bytes + states.num_bytes
    rows = (*states.rows(), *_table(cache, num_blocks, kv_bytes, max_model_len, budget, budget.free - used))
    return CacheSize(num_blocks, used, rows, states.num_running + states.num_snapshots)


def longest_context(
    info: ModelInfo, cache: CacheConfig, scheduler: SchedulerConfig, most: int, budget: KVBudget
) -> int:  # fmt: skip
    """The longest context of at most `most` tokens that one sequence may fill; whole blocks if it is shorter."""

    def fits(length: int) -> bool:
        try:
            size_cache(info, cache, scheduler, length, budget)
        except SizingError:
            return False
        return True

    if fits(most):
        return most
    low, high = 1, max(1, most // cache.block_size)  # in blocks; where one is too much, size_cache says so
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * cache.block_size) else (low, middle - 1)
    return min(most, low * cache.block_size)


def _size_states(
    info: ModelInfo, cache: CacheConfig, scheduler: SchedulerConfig, num_bytes: int, groups: list[_Group]
) -> _States:  # fmt: skip
    """One for each running sequence, fewer where half of the memory holds no more beside KV. Snapshots get their share
    of the memory, as far as it is left over by these and by the KV of one sequence of the full length.
    """
    if not info.state_specs:
        return _States()
    size = sum(spec.bytes_per_sequence() for spec in info.state_specs)
    num_running = min(scheduler.max_num_seqs, (num_bytes // 2 if groups else num_bytes) // size)
    if num_running == 0:
        raise SizingError(
            f"the recurrent state of one sequence needs {_gib(size)} but {_gib(num_bytes)} is available; raise "
            "--gpu-memory-utilization or --kv-cache-memory-bytes"
        )
    if not cache.enable_prefix_caching:
        return _States(size, num_running)
    left = num_bytes - num_running * size - sum((group.min_blocks + 1) * group.block_bytes for group in groups)
    num_snapshots = min(int(cache.state_snapshot_share * num_bytes), max(0, left)) // size
    return _States(size, num_running, min(num_snapshots, MAX_SNAPSHOTS * scheduler.max_num_seqs))


def _group(info: ModelInfo, index: int, cache: CacheConfig, scheduler: SchedulerConfig, max_model_len: int) -> _Group:
    group = info.cache_groups[index]
    specs = {spec.layer: spec for spec in info.cache_specs}
    length = _blocks_of(group, cache, scheduler, max_model_len)
    block_bytes = cache.block_size * sum(specs[layer].bytes_per_token() for layer in group.layers)
    return _Group(block_bytes, length, length * scheduler.max_num_seqs)


def _blocks_of(group: CacheGroup, cache: CacheConfig, scheduler: SchedulerConfig, max_model_len: int) -> int:
    """Blocks that one sequence of the full length needs."""
    length = -(-max_model_len // cache.block_size)
    if not group.window:
        return length
    seen = group.window - 1 + min(scheduler.max_num_batched_tokens, max_model_len)
    return min(length, -(-seen // cache.block_size) + 1)


def _largest_count(groups: list[_Group], budget: int) -> int:
    """Largest count with every group at min(count, its maximum), null blocks included, within the budget."""
    low, high = 0, max((group.max_blocks for group in groups), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        need = sum((min(middle, group.max_blocks) + 1) * group.block_bytes for group in groups)
        low, high = (middle, high) if need <= budget else (low, middle - 1)
    return low


def _too_small(groups: list[_Group], count: int, budget: int, cache: CacheConfig, max_model_len: int) -> str:
    need_blocks = max(group.min_blocks for group in groups)
    need = sum((group.min_blocks + 1) * group.block_bytes for group in groups)
    if cache.num_gpu_blocks_override is not None:
        return _too_few(need_blocks, count, max_model_len)
    return (
        f"one sequence of {max_model_len} tokens needs {_gib(need)} of KV cache but {_gib(budget)} is available "
        f"({count} blocks of {cache.block_size} tokens); lower --max-model-len or --max-num-batched-tokens, or raise "
        "--gpu-memory-utilization or --kv-cache-memory-bytes"
    )


def _too_few(needed: int, count: int, max_model_len: int) -> str:
    return (
        f"one sequence of {max_model_len} tokens needs {needed} KV blocks but --num-gpu-blocks-override is {count}; "
        "raise it or lower --max-model-len"
    )


def _table(
    cache: CacheConfig, num_blocks: tuple[int, ...], num_bytes: int, max_model_len: int, budget: KVBudget, left: int
) -> tuple[tuple[str, str], ...]:
    blocks = " + ".join(str(count) for count in num_blocks)
    tokens = max(num_blocks, default=0) * cache.block_size
    capacity = f"{tokens} tokens, {tokens / max_model_len:.1f} sequences of {max_model_len}"
    return (
        *((label, _gib(num)) for label, num in budget.rows),
        *((("KV cache", f"{_gib(num_bytes)}: {blocks} blocks of {cache.block_size} tokens"),) if num_blocks else ()),
        *((("KV capacity", capacity),) if num_blocks else ()),
        ("free memory left", _gib(max(0, left))),
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / (1 << 20):.1f} MiB"
