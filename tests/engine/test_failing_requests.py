"""A request that fails takes its own blocks out of the prefix cache, and nobody else's."""

from __future__ import annotations

import numpy as np
import pytest
from engine_walk_cases import LAYOUTS, ORDERS, Walk, make_engine
from fake_model import BLOCK_SIZE, NAN_TOKEN, FakeModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuseline.engine.memory.block_pool import BlockPool
from fuseline.engine.memory.prefix_cache import PrefixTree

SHARED = list(range(1, 13))  # three blocks
EACH_ORDER = pytest.mark.parametrize("order", ORDERS)
NOTHING_LEFT = [
    {"allowed_token_ids": (4, 5), "bad_words": ((4,), (5,))},
    {"repetition_penalty": 1e-46},
    {"temperature": 0.01, "logit_bias": ((4, 3e38),)},
    {"allowed_token_ids": (0, 3), "eos_token_ids": (0,), "stop_token_ids": (3,), "min_tokens": 5},
]


class FaultyModel(FakeModel):
    """Logits are NaN for a sequence whose token at position 8 is `faulty`."""

    faulty: int | None = None

    def _row(self, inputs, seq, position) -> np.ndarray:
        row = super()._row(inputs, seq, position)
        if self.faulty is None or position < 8:
            return row
        slot = int(inputs.block_tables[0, seq, 8 // self.block_size]) * self.block_size + 8 % self.block_size
        return np.full_like(row, np.nan) if self.caches[0][slot, 0] == self.faulty else row


def faulty_walk(**settings) -> tuple[Walk, FaultyModel]:
    engine = make_engine(**settings)
    model = engine.runner.model
    model.__class__ = FaultyModel
    return Walk(engine), model


def num_cached(walk: Walk, prompt: list[int]) -> int:
    name = walk.submit(prompt, max_tokens=1)
    walk.finish()
    return walk.outputs[name, 0][0].num_cached_tokens


def check_all_but(walk: Walk, bad: list[str], windows=(0,)) -> None:
    good = Walk(walk.engine)
    good.requests = {name: request for name, request in walk.requests.items() if name not in bad}
    good.outputs = walk.outputs
    good.check_all(windows)


def check_no_fault_is_cached(walk: Walk) -> None:
    """Once nothing runs: no cached block holds a faulty token."""
    engine = walk.engine
    for group, cache in zip(engine.kv.groups, engine.runner.model.caches, strict=True):
        for block in group.pool._cached.values():
            assert NAN_TOKEN not in cache[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE, 0]


@EACH_ORDER
@pytest.mark.parametrize("layout", ["full", "mixed"])
@pytest.mark.parametrize("n", [1, 3])
def test_blocks_of_others_stay_and_its_own_go(order, layout, n) -> None:
    walk = Walk(make_engine(LAYOUTS[layout], order=order))
    walk.submit(SHARED, max_tokens=6)
    walk.finish()
    bad = walk.submit([*SHARED, NAN_TOKEN, *range(20, 30)], max_tokens=6, n=n)
    walk.finish()
    assert [walk.reason(bad, index) for index in range(n)] == ["error"] * n
    assert walk.outputs[bad, 0][0].num_cached_tokens == 12, "it took part in the prefix that was there"
    assert not walk.outputs[bad, 0][0].is_bad_request
    check_no_fault_is_cached(walk)
    assert num_cached(walk, [*SHARED, NAN_TOKEN, *range(20, 30)]) == 12
    assert num_cached(walk, [*SHARED, 40]) == 12


@EACH_ORDER
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompt_scores_that_are_not_finite(order, max_tokens) -> None:
    walk = Walk(make_engine(order=order))
    good = walk.submit(SHARED, max_tokens=4, prompt_logprobs=1)
    bad = walk.submit([*range(20, 28), NAN_TOKEN, *range(28, 36)], max_tokens=max_tokens, prompt_logprobs=1)
    walk.finish()
    assert (walk.reason(good), walk.reason(bad)) == ("length", "error")
    assert "not finite" in walk.outputs[bad, 0][-1].error and len(walk.outputs[bad, 0]) == 1
    check_no_fault_is_cached(walk)
    check_all_but(walk, [bad])


@EACH_ORDER
@pytest.mark.parametrize("params", NOTHING_LEFT)
def test_a_sampler_that_is_left_nothing_spoils_no_block(order, params) -> None:
    walk = Walk(make_engine(order=order))
    good = walk.submit(SHARED, max_tokens=12)
    for _ in range(3):
        walk.step()
    bad = walk.submit([*range(20, 33)], **{"max_tokens": 6, **params})
    walk.finish()
    assert walk.reason(bad) == "error" and walk.reason(good) == "length"
    last = walk.outputs[bad, 0][-1]
    assert last.is_bad_request and "no token is left" in last.error
    assert num_cached(walk, [*range(20, 33)]) == 12, "its blocks are right"
    assert num_cached(walk, [*SHARED, 40]) == 12


@EACH_ORDER
def test_what_was_computed_from_its_blocks_goes_and_who_did_goes_on(order) -> None:
    walk, model = faulty_walk(order=order)
    head = [7, 7, 7, 7, 8, 8, 8, 8]
    first = walk.submit([*head, 33], max_tokens=40)
    for _ in range(3):
        walk.step()
    second = walk.submit([*head, *range(20, 28), 3], max_tokens=20)
    for _ in range(3):
        walk.step()
    assert walk.outputs[second, 0][0].num_cached_tokens == len(head)
    model.faulty = 33
    while (first, 0) not in walk.outputs or walk.outputs[first, 0][-1].finish_reason is None:
        walk.step()
    model.faulty = None
    walk.finish()
    assert walk.reason(first) == "error" and walk.reason(second) == "length"
    assert not len(walk.engine.kv._tree), "nothing else was cached"
    assert num_cached(walk, [*head, *range(20, 28), 3]) == 0
    assert num_cached(walk, [*head, *range(20, 28), 3]) == 16, "computed anew, and cached"


@EACH_ORDER
def test_who_waits_for_its_block_computes_it(order) -> None:
    walk = Walk(make_engine(order=order))
    bad = walk.submit([*SHARED, *range(20, 28), NAN_TOKEN], max_tokens=4)
    walk.step()
    deferred = walk.submit([*SHARED, *range(20, 28), 3], max_tokens=4)
    walk.step()
    walk.finish()
    assert walk.reason(bad) == "error" and walk.reason(deferred) == "length"
    check_no_fault_is_cached(walk)
    check_all_but(walk, [bad])


@EACH_ORDER
def test_the_swapped_come_back_but_share_no_faulty_block(order) -> None:
    walk, model = faulty_walk(num_blocks=14, num_host_blocks=60, order=order, scheduling_policy="priority")
    head = [7, 7, 7, 7, 8, 8, 8, 8]
    first = walk.submit([*head, 33], max_tokens=40, priority=1)
    for _ in range(3):
        walk.step()
    second = walk.submit([*head, 21, 22, 23, 24], max_tokens=12, priority=5)
    for _ in range(3):
        walk.step()
    assert walk.outputs[second, 0][0].num_cached_tokens == len(head)
    walk.submit([5] * 30, max_tokens=8, priority=2)
    while walk.engine.kv.swap.num_sequences == 0:
        walk.step()
    model.faulty = 33
    while walk.outputs[first, 0][-1].finish_reason is None:
        walk.step()
    model.faulty = None
    assert walk.engine.kv.swap.num_sequences == 1
    walk.finish()
    assert (walk.reason(first), walk.reason(second)) == ("error", "length")
    assert num_cached(walk, [*head, 21, 22, 23, 24, 1]) == 0
    check_all_but(walk, [first])


@EACH_ORDER
def test_a_reset_is_final_for_what_runs_too(order) -> None:
    """Blocks that a running sequence fills later were computed from what is forgotten."""
    walk = Walk(make_engine(order=order))
    walk.submit(SHARED, max_tokens=30)
    for _ in range(4):
        walk.step()
    walk.engine.reset_prefix_cache()
    walk.finish()
    assert num_cached(walk, [*SHARED, *walk.tokens("r0")]) == 0
    walk.check_all((0,))


tails = st.lists(st.integers(1, 3), min_size=1, max_size=12)


@EACH_ORDER
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    before=st.lists(tails, min_size=1, max_size=4),
    after=st.lists(st.tuples(tails, st.booleans(), tails, st.integers(1, 3), st.integers(0, 4)), max_size=8),
    host=st.sampled_from([0, 60]),
)
def test_any_failures_leave_the_others_blocks(layout, order, before, after, host) -> None:
    windows = LAYOUTS[layout]
    walk = Walk(make_engine(windows, 200, num_host_blocks=host, order=order))
    for tail in before:
        walk.submit([*SHARED, *tail], max_tokens=3, temperature=0.0)
        walk.finish()
    bad = []
    for head, is_bad, tail, n, num_steps in after:
        name = walk.submit([*SHARED, *head, *([NAN_TOKEN] if is_bad else []), *tail], max_tokens=4, n=n)
        bad += [name] if is_bad and 0 in windows else []
        for _ in range(num_steps):
            walk.step()
    walk.finish()
    if 0 in windows:
        for name in bad:
            assert {walk.reason(name, index) for index in range(walk.requests[name].params.n)} == {"error"}
        check_no_fault_is_cached(walk)
        check_all_but(walk, bad, windows)
        for tail in before:
            prompt = [*SHARED, *tail]
            assert num_cached(walk, prompt) == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_ancestors_are_known_as_long_as_a_descendant_is_cached() -> None:
    tree, keys = PrefixTree(), [b"1", b"2", b"3"]
    pool = BlockPool(3, tree)
    first, middle, last = pool.allocate(3)
    pool.commit(first, keys, 0, "bad")
    pool.commit(middle, keys, 1, "bad")
    pool.commit(last, keys, 2, "good")
    pool.release(middle)
    (reused,) = pool.allocate(1)
    assert reused == middle and pool.find(b"2") is None
    assert tree.descendants({b"1"}) == {b"2", b"3"}
    bad = pool.keys_of("bad")
    pool.forget(bad | tree.descendants(bad))
    assert pool.find(b"3") is None and len(tree) == 0


def test_ancestors_that_left_before_their_descendant_came_are_known() -> None:
    """Whoever computed a block that another had in the cache holds its own, without a key."""
    tree, keys = PrefixTree(), [b"1", b"2", b"3"]
    pool = BlockPool(4, tree)
    first, last = pool.allocate(2)
    pool.commit(last, keys, 2, "good")
    assert len(tree) == 3, "its chain"
    pool.commit(first, keys, 0, "bad")
    assert tree.descendants({b"1"}) == {b"2", b"3"}
    pool.forget(pool.keys_of("good"))
    assert len(tree) == 1 and pool.find(b"1") == first
    pool.forget(pool.keys_of("bad"))
    assert len(tree) == 0
