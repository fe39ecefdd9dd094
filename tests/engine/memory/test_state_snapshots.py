"""Snapshots of recurrent states: which prefixes are found by them, and that a wrong one would be seen in the tokens."""

from __future__ import annotations

import pytest
from engine_walk_cases import ORDERS, Walk, make_engine
from fake_model import NAN_TOKEN

from fuseline.engine.memory.state_pool import KnownPrefixes, StatePool

PROMPT = list(range(1, 15))
"""14 tokens: three blocks that others can take over."""
LAYOUTS = {"only states": (), "full": (0,), "mixed": (0, 6)}
EACH_ORDER = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(params=LAYOUTS)
def windows(request) -> tuple[int, ...]:
    return LAYOUTS[request.param]


def make_walk(windows=(0,), num_states: int = 12, **config) -> Walk:
    return Walk(make_engine(windows, num_states=num_states, **config))


def ask(walk: Walk, prompt: list[int], **params) -> int:
    """Tokens that a request has found in the cache, once it is answered."""
    name = walk.submit(prompt, **{"max_tokens": 3, **params})
    walk.finish()
    return walk.outputs[name, 0][0].num_cached_tokens


@EACH_ORDER
def test_a_prompt_is_found_to_its_last_border(order, windows) -> None:
    walk = make_walk(windows, order=order)
    assert [ask(walk, PROMPT) for _ in range(3)] == [0, 12, 12]
    assert sum(walk.counts) == len(PROMPT) + 2 * 2 + 3 * 2, "prompts, rests of prompts, tokens of answers"
    assert ask(walk, PROMPT[:12]) == 0, "no state is kept behind its second block"
    assert [ask(walk, PROMPT[:12]), ask(walk, PROMPT[:13])] == [8, 12]
    assert (walk.engine.scheduler.prefix_queries, walk.engine.scheduler.prefix_hits) == (3 * 14 + 2 * 12 + 13, 44)
    walk.check_all(windows, with_state=True)


@EACH_ORDER
def test_a_shared_prefix_is_found_from_the_third_prompt_on(order, windows) -> None:
    walk = make_walk(windows, order=order)
    assert [ask(walk, [*PROMPT[:9], *[30 + k] * 9]) for k in range(4)] == [0, 0, 8, 8]
    walk.check_all(windows, with_state=True)


@EACH_ORDER
def test_prompts_that_come_together_compute_what_they_share_once(order, windows) -> None:
    walk = make_walk(windows, order=order, num_states=20, max_num_batched_tokens=32, max_num_seqs=8, num_blocks=60)
    names = [walk.submit([*PROMPT, *[30 + k] * 5], max_tokens=2) for k in range(6)]
    walk.finish()
    assert [walk.outputs[name, 0][0].num_cached_tokens for name in names] == [0] + [12] * 5
    assert sum(walk.counts) == 19 + 5 * 7 + 6
    walk.check_all(windows, with_state=True)


def test_who_comes_later_is_not_waited_for() -> None:
    """The one that computes the prefix has passed the border: the second makes the snapshot, the third finds it."""
    walk = make_walk((), max_num_batched_tokens=8, max_num_partial_prefills=3, long_prefill_token_threshold=4)
    walk.submit(list(range(1, 31)), max_tokens=1)
    for _ in range(4):
        walk.step()
    names = [walk.submit([*PROMPT[:9], 40 + k], max_tokens=1) for k in range(2)]
    walk.finish()
    assert [walk.outputs[name, 0][0].num_cached_tokens for name in names] == [0, 8]
    walk.check_all((), with_state=True)


@EACH_ORDER
@pytest.mark.parametrize("length", range(9, 13))
def test_a_conversation_goes_on_behind_the_last_answer(order, length, windows) -> None:
    walk = make_walk(windows, order=order)
    tokens = PROMPT[:9]
    for _ in range(3):
        name = walk.submit(tokens, max_tokens=length, min_tokens=length)
        walk.finish()
        told = tokens + walk.tokens(name)
        found, tokens = (len(told) - 1) // 4 * 4, told + [3, 2]
        assert ask(walk, tokens, max_tokens=1) == found
        if len(tokens) > 40:
            break
    walk.check_all(windows, with_state=True)


def test_only_the_newest_state_behind_a_prompt_is_kept() -> None:
    walk = make_walk((), num_states=16)
    walk.submit(PROMPT, max_tokens=40)
    while walk.engine.has_work:
        walk.step()
        assert walk.engine.kv.states.num_snapshots <= 2
    assert walk.engine.kv.states.num_snapshots == 2


def test_a_state_that_was_used_stays_when_its_sequence_goes_on() -> None:
    walk = make_walk((), num_states=16, max_num_seqs=2)
    first = walk.submit(PROMPT, max_tokens=30)
    while len(walk.tokens(first) if walk.outputs else []) < 7:
        walk.step()
    told = PROMPT + walk.tokens(first)
    for _ in range(2):
        name = walk.submit([*told, 1], max_tokens=1)
        for _ in range(8):
            walk.step()
        assert walk.outputs[name, 0][0].num_cached_tokens == len(told) // 4 * 4
    walk.finish()
    walk.check_all((), with_state=True)


@EACH_ORDER
@pytest.mark.parametrize("caching", [True, False])
def test_choices_share_their_prompt(order, caching, windows) -> None:
    walk = make_walk(windows, order=order, enable_prefix_caching=caching)
    name = walk.submit(PROMPT, n=3, max_tokens=3)
    walk.finish()
    assert sum(walk.counts) == 14 + 2 * 2 + 3 * 2
    assert ask(walk, PROMPT) == (12 if caching else 0)
    walk.check_all(windows, with_state=True)
    assert walk.outputs[name, 0][0].num_cached_tokens == 0


def test_another_salt_finds_nothing() -> None:
    walk = make_walk()
    assert [ask(walk, PROMPT, cache_salt=salt) for salt in ("", "a", "a", "b", "")] == [0, 0, 12, 0, 12]


def test_scores_of_a_prompt_need_all_of_it_and_leave_their_states() -> None:
    walk = make_walk()
    assert [ask(walk, PROMPT, prompt_logprobs=wanted) for wanted in (1, 1, None)] == [0, 0, 12]
    walk.check_all((0,), with_state=True)


@EACH_ORDER
def test_nothing_is_found_after_a_reset_or_sleep(order, windows) -> None:
    walk = make_walk(windows, order=order)
    ask(walk, PROMPT)
    walk.engine.reset_prefix_cache()
    assert ask(walk, PROMPT) == 0
    walk.engine.pause()
    walk.engine.runner.model.allocate_states(12)
    walk.engine.resume()
    assert [ask(walk, PROMPT), ask(walk, PROMPT)] == [0, 12]
    walk.submit(PROMPT[::-1], max_tokens=20)
    for _ in range(6):
        walk.step()
    walk.engine.reset_prefix_cache()
    walk.finish()
    assert ask(walk, PROMPT[::-1]) == 0, "a sequence of the old cache leaves no states"
    walk.check_all(windows, with_state=True)


@EACH_ORDER
def test_a_preempted_sequence_goes_on_from_its_newest_state(order, windows) -> None:
    config = {"max_num_seqs": 1, "scheduling_policy": "priority", "order": order}
    walk = make_walk(windows, num_states=6, **config)
    walk.submit(PROMPT, max_tokens=16, priority=5)
    for _ in range(9):
        walk.step()
    walk.submit([9, 8], max_tokens=3, priority=1)
    walk.finish()
    assert walk.engine.scheduler.num_preemptions == 1
    assert sum(walk.counts) <= len(PROMPT) + 16 + 2 + 3 + 4, "less than a block twice"
    walk.check_all(windows, with_state=True)


@EACH_ORDER
def test_the_longest_prefix_with_blocks_and_state_is_taken(order) -> None:
    """Twelve blocks, so that a prompt takes the last ones of another, while there are states enough."""
    walk = make_walk(num_blocks=12, num_states=40, order=order)
    long, other = list(range(1, 31)), list(range(40, 10, -1))
    assert [ask(walk, long[:14]), ask(walk, long), ask(walk, long)] == [0, 12, 28]
    ask(walk, other)
    assert ask(walk, long) == 12, "the state behind 28 tokens is there, blocks before it are not"
    walk.check_all((0,), with_state=True)


@EACH_ORDER
def test_blocks_without_a_state_are_computed_again(order) -> None:
    """Into other blocks, of which there are enough only if the old ones are given up."""
    walk = make_walk(num_blocks=12, num_states=12, order=order)
    prompt = [*PROMPT, *PROMPT]
    assert [ask(walk, prompt), ask(walk, prompt)] == [0, 24]
    walk.engine.kv.states.forget_all()
    assert [ask(walk, prompt), ask(walk, prompt)] == [0, 24]
    walk.check_all((0,), with_state=True)


@EACH_ORDER
def test_the_least_recently_used_state_makes_room(order) -> None:
    walk = make_walk((), num_states=3, max_num_seqs=1, order=order)
    prompts = [[k, *PROMPT] for k in (20, 21, 22)]
    for prompt in prompts[:2]:
        ask(walk, prompt, max_tokens=1)
    assert ask(walk, prompts[0], max_tokens=1) == 12
    ask(walk, prompts[2], max_tokens=1)
    assert [ask(walk, prompts[k], max_tokens=1) for k in (0, 1)] == [12, 0]
    walk.check_all((), with_state=True)


def test_a_sequence_that_holds_the_only_state_leaves_no_snapshot() -> None:
    walk = make_walk((), num_states=1, max_num_seqs=1)
    assert [ask(walk, PROMPT) for _ in range(2)] == [0, 0], "no slot was free for a snapshot"
    walk.check_all((), with_state=True)


@EACH_ORDER
def test_states_of_a_faulty_request_are_forgotten(order, windows) -> None:
    walk = make_walk(windows, order=order)
    faulty = [*PROMPT[:6], NAN_TOKEN, *PROMPT]
    names = [walk.submit([*faulty, k], max_tokens=3) for k in range(2)]
    walk.finish()
    assert [walk.reason(name) for name in names] == ["error"] * 2
    assert walk.engine.kv.states.num_snapshots == 0, "nor what the second computed from the state of the first"
    assert ask(walk, faulty[:9]) == 0


@EACH_ORDER
def test_a_prompt_that_ends_at_the_budget_needs_no_step_more(order) -> None:
    """Steps: to the border, where the chunk ends anyway, and the rest of the prompt, the second time from there."""
    walk = make_walk((), order=order, max_num_batched_tokens=12)
    walk.submit(PROMPT, max_tokens=1)
    walk.finish()
    assert walk.counts[:2] == [12, 2]
    walk.submit([*PROMPT, *PROMPT], max_tokens=1)
    walk.finish()
    assert walk.counts[2:] == [12, 4]


def test_prompts_cut_at_their_border_start_together() -> None:
    """The rest of a block is no partial prompt, of which one may be under way."""
    walk = make_walk(num_states=12, max_num_seqs=4, max_num_batched_tokens=64, num_blocks=60)
    for k in range(4):
        walk.submit([k + 1, *PROMPT], max_tokens=1)
    walk.finish()
    assert walk.counts == [4 * 12, 4 * 3]


def pool_with(content: dict[int, str], size: int = 4) -> tuple[StatePool, list[str]]:
    return StatePool(size), [content.get(slot, "") for slot in range(size)]


def apply(pool: StatePool, content: list[str]) -> None:
    pairs = pool.take_copies()
    if pairs is not None:
        assert len(set(pairs[1].tolist())) == pairs.shape[1]
        for target, state in zip(pairs[1].tolist(), [content[source] for source in pairs[0].tolist()], strict=True):
            content[target] = state


def test_copies_of_a_step_follow_each_other() -> None:
    pool, content = pool_with({0: "a"})
    first = pool.allocate()
    assert first == 0 and pool.save([b"k"], 0, first, "r")
    pool.free(first)
    second = pool.restore(b"k")
    assert second == first, "the slot that was saved a moment ago"
    third = pool.restore(b"k")
    apply(pool, content)
    assert content[second] == content[third] == "a" and pool.take_copies() is None
    content[second] = "b"
    assert pool.save([b"k", b"l"], 1, second, "r")
    pool.forget([b"k"])
    apply(pool, content)
    assert pool.longest_hit([b"k", b"l"], 2) == 2 and pool.longest_hit([b"k", b"l"], 1) == 0
    assert content[pool._snapshots[b"l"].slot] == "b"


def test_a_snapshot_whose_slot_is_needed_goes_over_to_its_sequence() -> None:
    pool, content = pool_with({0: "a"}, size=2)
    slot = pool.allocate()
    pool.save([b"k"], 0, slot, "r")
    apply(pool, content)
    assert pool.num_free == 1
    other = pool.restore(b"k")
    apply(pool, content)
    assert content[other] == "a" and pool.num_free == 0 and not pool.num_snapshots


def test_known_prefixes_are_bounded() -> None:
    known = KnownPrefixes(3)
    known.add([b"a", b"b", b"c"])
    assert known.longest([b"a", b"b", b"x"], 3) == 2
    known.add([b"d"])
    assert known.longest([b"c"], 1) == 0 and known.longest([b"a", b"b", b"d"], 3) == 3
