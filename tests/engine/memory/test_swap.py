"""Preemption by swapping: the KV of who has to make room goes to host memory and comes back; nothing is recomputed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_walk_cases import ORDERS, Walk, make_engine
from fake_gpu import GPU, no_host_sync
from fake_model import BLOCK_SIZE, FakeModel
from zoo import checkpoint

from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph_inputs import BlockCopy
from fuseline.engine.memory.sizing import GIB, SizingError
from fuseline.engine.memory.swap import SwapSpace, host_blocks

PROMPT = list(range(1, 12))


def crowd(**config) -> Walk:
    """Four sequences of which about two fit."""
    walk = Walk(make_engine(num_blocks=20, **config))
    for number in range(4):
        walk.submit([number + 1, *PROMPT], max_tokens=40, temperature=float(number % 2))
    return walk


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("windows", [(0,), (0, 6)], ids=["full", "mixed"])
def test_what_was_swapped_is_not_computed_again(windows, order) -> None:
    walk = crowd(windows=windows, num_host_blocks=60, order=order)
    seen = []
    while walk.engine.has_work:
        walk.step()
        seen.append((walk.engine.kv.swap.num_sequences, walk.engine.kv.swap.usage > 0))
    walk.finish()
    walk.check_all(windows)
    scheduler, swaps = walk.engine.scheduler, walk.engine.runner.model.num_swaps
    assert scheduler.num_preemptions > 1 and swaps[True] == scheduler.num_preemptions
    assert (2, True) in seen or (1, True) in seen
    assert sum(walk.counts) == 4 * (len(PROMPT) + 1 + 39), "each token once"


def test_without_room_on_the_host_it_is_computed_anew() -> None:
    walk = crowd(num_host_blocks=5)
    walk.finish()
    walk.check_all((0,))
    assert sum(walk.counts) > 4 * (len(PROMPT) + 1 + 39)


def test_blocks_that_the_prefix_cache_holds_do_not_come_back_twice() -> None:
    walk = Walk(make_engine(num_host_blocks=60, max_num_seqs=1, scheduling_policy="priority"))
    walk.submit(PROMPT, max_tokens=20, priority=5)
    for _ in range(5):
        walk.step()
    engine, copies = walk.engine, []
    swap = engine.runner.model.swap
    engine.runner.model.swap = lambda planned: (copies.extend(planned), swap(planned))
    walk.submit([40, 41], max_tokens=2, priority=1)
    walk.finish()
    walk.check_all((0,))
    (out, back) = copies
    num_computed = len(PROMPT) + 4
    assert out.is_out and out.pairs[0].shape == (2, -(-num_computed // BLOCK_SIZE))
    assert not back.is_out and back.pairs[0].shape == (2, 1), "full blocks are cached"


@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize("windows", [(0,), (0, 13)], ids=["full", "mixed"])
@pytest.mark.parametrize("order", ORDERS)
def test_what_came_back_is_found_by_others(order, windows, is_reset: bool) -> None:
    """But not what was computed before the prefix cache was reset."""
    walk = Walk(make_engine(windows, 6, num_host_blocks=60, scheduling_policy="priority", order=order))
    engine = walk.engine
    walk.submit(PROMPT, max_tokens=12, priority=5)
    walk.step()
    walk.submit([40] * 20, max_tokens=3, priority=1)  # takes all blocks
    while engine.kv.swap.num_sequences == 0:
        walk.step()
    if is_reset:
        engine.reset_prefix_cache()
    while engine.kv.swap.num_sequences:
        walk.step()
    hits = engine.scheduler.prefix_hits
    walk.submit(PROMPT, max_tokens=1, priority=5)
    walk.finish()
    walk.check_all(windows)
    assert engine.scheduler.prefix_hits - hits == (0 if is_reset else len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE)


@pytest.mark.parametrize("end", ["abort", "pause"])
def test_host_blocks_are_given_back_by_who_does_not_come_back(end: str) -> None:
    walk = crowd(num_host_blocks=60)
    while walk.engine.kv.swap.num_sequences == 0:
        walk.step()
    if end == "abort":
        for number in range(4):
            walk.engine.abort(f"r{number}")
    else:
        walk.engine.pause()
        walk.engine.resume()
    assert walk.engine.kv.swap.usage == 0
    walk.finish()
    walk.check_all((0,))


def test_copies_follow_each_other_in_the_order_of_the_schedule() -> None:
    space = SwapSpace([2])
    first = space.save(8, [0], [[7, 8]])
    assert space.save(4, [0], [[9]]) is None and space.usage == 1.0
    space.restore(first, [[5, None]])
    second = space.save(4, [0], [[5]])
    copies = space.take_copies()
    assert [copy.is_out for copy in copies] == [True, False, True] and not space.copies
    assert copies[1].pairs[0].tolist() == [[5], [first.blocks[0][0]]], "the second has been found elsewhere"
    assert copies[2].pairs[0].tolist() == [[5], second.blocks[0]] and space.num_sequences == 1


def test_host_blocks_by_size() -> None:
    info = FakeModel((0, 6)).info  # 128 bytes a block and layer
    gib = 128 * 30 / GIB
    assert host_blocks(info, BLOCK_SIZE, gib, [40, 20], 1 << 40) == [20, 10]
    assert host_blocks(info, BLOCK_SIZE, 1.0, [40, 20], 1 << 40) == [40, 20], "more is of no use"
    with pytest.raises(SizingError, match="--swap-space 8.0 GiB is 80%"):
        host_blocks(info, BLOCK_SIZE, 8.0, [40, 20], 10 * GIB)


def test_much_swap_space_is_warned_of(caplog) -> None:
    info = FakeModel().info
    host_blocks(info, BLOCK_SIZE, 3.9, [40], 10 * GIB)
    assert not caplog.records
    host_blocks(info, BLOCK_SIZE, 4.1, [40], 10 * GIB)
    assert "--swap-space 4.1 GiB is 41 % of this machine's memory" in caplog.text


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e5m2"])
def test_a_gpus_caches_go_out_and_come_back(kv_cache_dtype: str) -> None:
    """Kernels interpreted: two groups of layers, blocks of all caches, nothing waited for."""
    config = CompileConfig(model=str(checkpoint("gpt_oss", "bfloat16")), kv_cache_dtype=kv_cache_dtype)
    model = compile_model(config, GPU)
    model.allocate_caches([6, 6])
    for cache in model._caches.values():
        cache.copy_(torch.randn(cache.shape))
    model.allocate_host_blocks([4, 3])
    caches = {name: cache.view(torch.uint8) for name, cache in model._caches.items()}
    before = {name: cache.clone() for name, cache in caches.items()}
    groups = [[f"{kind}_cache_{layer}" for layer in group.layers for kind in "kv"] for group in model.info.cache_groups]
    out = BlockCopy(True, (np.array([[5, 2, 3], [0, 3, 1]]), np.array([[1], [2]])))
    back = BlockCopy(False, (np.array([[2, 4], [0, 1]]), np.array([[], []], np.int64)))
    with no_host_sync():
        model.swap([out, back])
    for name in groups[0]:
        found = caches[name]
        assert torch.equal(found[2], before[name][5]) and torch.equal(found[4], before[name][3])
        assert all(torch.equal(found[block], before[name][block]) for block in (0, 1, 3, 5))
    back = BlockCopy(False, (np.array([[], []], np.int64), np.array([[4], [2]])))
    model.swap([back])
    for name in groups[1]:
        assert torch.equal(caches[name][4], before[name][1])
