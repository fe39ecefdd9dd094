"""Blocks, prefix keys, windows, and the arithmetic of the KV cache's size."""

from __future__ import annotations

import dataclasses
import shutil
from array import array
from pathlib import Path

import pytest
import zoo
from fake_model import FakeModel
from served_fake import served_fake

from fuseline.compile.capture.errors import LoadError
from fuseline.compile.config import CompileConfig
from fuseline.engine.build import build_compiled_model
from fuseline.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from fuseline.engine.memory.block_pool import BlockPool
from fuseline.engine.memory.cache_groups import CacheGroup
from fuseline.engine.memory.free_memory import free_memory
from fuseline.engine.memory.sizing import (
    Memory,
    ProfiledMemory,
    SizingError,
    kv_budget_on_gpu,
    kv_budget_on_host,
    longest_context,
    size_cache,
)
from fuseline.engine.state.block_keys import extend_keys, root_key

MIB = 1 << 20


def keys_of(count: int, salt: str = "", tokens=None) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, root_key(salt, 0), array("i", tokens or range(4 * count)), 4, count)
    return keys


def test_free_blocks_are_reused_uncached_first_then_oldest() -> None:
    pool = BlockPool(4)
    first, second, third, fourth = pool.allocate(4)
    for block, key in ((first, b"1"), (second, b"2"), (fourth, b"4")):
        pool.commit(block, [key], 0, "r")
    for block in (second, third, first, fourth):
        pool.release(block)
    pool.take(first)
    pool.release(first)
    assert pool.allocate(4) == [third, second, fourth, first]
    assert [pool.find(key) for key in (b"1", b"2", b"4")] == [None, None, None]


def test_shared_block_is_free_only_when_all_holders_are_gone() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.commit(block, [b"k"], 0, "r")
    pool.take(pool.find(b"k"))
    pool.release(block)
    assert not pool.is_free(block) and pool.num_free == 1
    pool.release(block)
    assert pool.is_free(block) and pool.find(b"k") == block


def test_first_block_with_a_key_keeps_it() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.commit(first, [b"k"], 0, "r")
    pool.commit(second, [b"k"], 0, "r")
    pool.release(second)
    pool.allocate(1)
    assert pool.find(b"k") == first


def test_a_block_that_nobody_holds_gives_its_key_to_a_newer_one() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.commit(first, [b"k"], 0, "r")
    pool.release(first)
    pool.commit(second, [b"k"], 0, "s")
    assert pool.find(b"k") == second and pool.keys_of("s") == {b"k"} and not pool.keys_of("r")
    assert pool.allocate(1) == [first], "its content is there twice: it is reused first"
    pool.release(second)
    pool.commit(second, [b"k"], 0, "s")
    assert pool.find(b"k") == second


def test_keys_depend_on_all_tokens_before_on_salt_variant_and_owner() -> None:
    plain = keys_of(3)
    assert keys_of(3, tokens=[9, *range(1, 12)])[2] != plain[2]
    assert keys_of(3, tokens=[*range(8), 99, 9, 10, 11])[:2] == plain[:2]
    roots = {root_key("", 0), root_key("a", 0), root_key("", 1), root_key("", 0, "a"), root_key("0", 0)}
    assert len(roots) == 5


def test_window_hit_needs_only_the_visible_blocks() -> None:
    group = CacheGroup(window=6, block_size=4, num_blocks=8)
    keys = keys_of(6)
    blocks = group.pool.allocate(6)
    for index in (0, 2, 3, 5):
        group.pool.commit(blocks[index], keys, index, "r")
    # A query at 16 sees 11..15, blocks 2 and 3; one at 24 sees block 4, which is missing.
    assert group.longest_hit(keys, 6) == 4
    assert group.hit_blocks(keys, 4) == [0, 0, blocks[2], blocks[3]]
    assert group.longest_hit(keys, 3) == 1
    full = CacheGroup(window=0, block_size=4, num_blocks=8)
    for index, block in enumerate(full.pool.allocate(3)):
        full.pool.commit(block, keys, (0, 1, 3)[index], "r")
    assert full.longest_hit(keys, 6) == 2


def sized(cache: CacheConfig, windows=(0,), free=100 * MIB, max_model_len=64, max_num_seqs=4):
    info = FakeModel(windows).info
    scheduler = SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=max_num_seqs)
    memory = Memory(free, free)
    room = kv_budget_on_host(info, cache.gpu_memory_utilization, memory, memory)
    return size_cache(info, cache, scheduler, max_model_len, room)


def test_sizes_from_memory_flags() -> None:
    # One block of 4 tokens: 4 * (4 + 4) * 4 bytes = 128.
    assert sized(CacheConfig(block_size=4, num_gpu_blocks_override=77)).num_blocks == (77,)
    assert sized(CacheConfig(block_size=4, kv_cache_memory_bytes=128 * 30)).num_blocks == (29,)
    assert sized(CacheConfig(block_size=4, gpu_memory_utilization=0.5), free=128 * 80).num_blocks == (39,)
    whole = sized(CacheConfig(block_size=4))
    assert whole.num_blocks == (64,) and whole.num_bytes == 65 * 128
    # Window 6 and steps of 16 tokens: at most 7 blocks a sequence.
    assert sized(CacheConfig(block_size=4), windows=(0, 6)).num_blocks == (64, 28)


def test_room_on_a_gpu() -> None:
    """The share is of the whole GPU; what is gone since before is ours; what others hold cannot be had."""
    info, steps = FakeModel().info, ProfiledMemory(activation_peak=5, graphs=3)

    def budget(share: float, before: int, now: int) -> int:
        return kv_budget_on_gpu(info, share, Memory(before, 100), Memory(now, 100), steps).num_bytes

    assert budget(0.9, before=98, now=60) == 90 - 38 - 8
    assert budget(0.9, before=50, now=12) == 12 - 8, "others leave less than the share"
    assert budget(0.3, before=98, now=60) == 0
    table = kv_budget_on_gpu(info, 0.9, Memory(98, 100), Memory(60, 100), steps)
    assert dict(table.rows) == {"weights": 0, "a step at most": 5, "kept for graphs": 3} and table.free == 52


def test_the_table_tells_of_weights_on_the_host() -> None:
    info = dataclasses.replace(FakeModel().info, weight_bytes=3 << 30, host_weight_bytes=2 << 30)
    cache, memory = CacheConfig(block_size=4, num_gpu_blocks_override=77), Memory(100 * MIB, 100 * MIB)
    room = kv_budget_on_gpu(info, 0.9, memory, memory, ProfiledMemory(0, 0))
    table = dict(size_cache(info, cache, SchedulerConfig(), 64, room).table)
    assert table["weights"] == "3.00 GiB" and table["weights on the host"] == "2.00 GiB"


def test_too_small_cache_names_the_flags() -> None:
    with pytest.raises(SizingError, match="--num-gpu-blocks-override is 15; raise it or lower --max-model-len"):
        sized(CacheConfig(block_size=4, num_gpu_blocks_override=15))
    with pytest.raises(SizingError, match="--gpu-memory-utilization or --kv-cache-memory-bytes") as error:
        sized(CacheConfig(block_size=4, kv_cache_memory_bytes=128 * 16))
    assert "\n" not in str(error.value)


def longest(cache: CacheConfig, most: int, free: int = 100 * MIB) -> int:
    memory = Memory(free, free)
    budget = kv_budget_on_host(FakeModel().info, 1.0, memory, memory)
    return longest_context(FakeModel().info, cache, SchedulerConfig(max_num_batched_tokens=16), most, budget)


def test_the_longest_context_that_fits() -> None:
    # One block of 4 tokens: 128 bytes; one block is nobody's.
    assert longest(CacheConfig(block_size=4), 4096) == 4096
    assert longest(CacheConfig(block_size=4), 4097, free=128 * 1024) == 4 * 1023
    assert longest(CacheConfig(block_size=4), 4093, free=128 * 1025) == 4093
    assert longest(CacheConfig(block_size=4, num_gpu_blocks_override=15), 4096) == 60
    with pytest.raises(SizingError):  # not even one block fits
        cache = CacheConfig(block_size=4, kv_cache_memory_bytes=100)
        sized(cache, max_model_len=longest(cache, 4096))


async def test_an_automatic_context_is_what_the_cache_holds() -> None:
    async with served_fake(fits_context=True, num_gpu_blocks_override=7) as served:
        assert served.client.ready.max_model_len == 28
        await served.collect([3] * 20, max_tokens=40)
        assert sum(map(sum, served.shapes)) <= 28
    async with served_fake(fits_context=True, num_gpu_blocks_override=70) as served:
        assert served.client.ready.max_model_len == 64


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}


def test_free_memory_without_groups(tmp_path: Path) -> None:
    assert free_memory(write(tmp_path, MEMINFO)) == 8000 * 1024


def test_free_memory_of_the_tightest_v2_group(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": "5000",
            "sys/fs/cgroup/a/memory.current": "3000",
            "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 500\n",
            "sys/fs/cgroup/a/b/memory.max": "max",
            "sys/fs/cgroup/a/b/memory.current": "100",
            "sys/fs/cgroup/a/b/memory.stat": "",
        },
    )
    assert free_memory(root) == 2500


def test_free_memory_of_a_v1_group_seen_from_inside(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "3000",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 200\n",
        },
    )
    assert free_memory(root) == 1200


@pytest.mark.parametrize(("family", "needed"), [("llama", 16), ("mistral", 2), ("gemma2", 16)])
def test_too_few_blocks_are_refused_before_weights_are_looked_for(family: str, needed: int, tmp_path: Path) -> None:
    """There are none. A model all of whose layers have a window needs as many as that and a step."""
    shutil.copy(zoo.checkpoint(family) / "config.json", tmp_path)
    compiling = CompileConfig(str(tmp_path), cache_dir=str(tmp_path / "cache"), skip_model_check=True)
    steps = SchedulerConfig(max_num_batched_tokens=8)

    def build(**settings: object) -> None:
        build_compiled_model(EngineConfig(compiling, CacheConfig(**settings), steps), lambda *_: None)

    with pytest.raises(SizingError, match=f"needs {needed} KV blocks but --num-gpu-blocks-override is {needed - 1}"):
        build(num_gpu_blocks_override=needed - 1)
    for settings in ({"num_gpu_blocks_override": needed}, {"num_gpu_blocks_override": 1, "fits_context": True}, {}):
        with pytest.raises(LoadError, match="holds no weights"):
            build(**settings)
