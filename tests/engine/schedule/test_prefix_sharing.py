"""Requests with one prefix that arrive together: it is computed once, and nobody waits for what will not come."""

from __future__ import annotations

import pytest
from engine_walk_cases import Walk, make_engine
from scheduler_cases import finish_order

PREFIX = list(range(1, 33))
"""Eight blocks."""


SLOWLY = {"long_prefill_token_threshold": 8, "max_num_partial_prefills": 3}
"""A prompt computes two blocks a step and leaves room for others."""


def make_walk(**config) -> Walk:
    return Walk(make_engine(num_blocks=60, **{"max_num_seqs": 8, "max_num_batched_tokens": 32, **config}))


def prompt(number: int) -> list[int]:
    return [*PREFIX, 35, number + 1]


def cached(walk: Walk) -> list[int]:
    return [walk.outputs[name, 0][0].num_cached_tokens for name in walk.requests]


def finish(walk: Walk) -> None:
    walk.finish()
    walk.check_all((0,))
    assert walk.engine.scheduler.waiting.num_deferred == 0 and not walk.engine.kv.in_flight


@pytest.mark.parametrize("num_tokens", [16, 32, 64])
def test_a_prefix_that_arrives_often_is_computed_once(num_tokens: int) -> None:
    walk = make_walk(max_num_batched_tokens=num_tokens)
    for number in range(6):
        walk.submit(prompt(number), max_tokens=1)
    finish(walk)
    assert cached(walk) == [0] + [32] * 5
    assert sum(walk.counts) == 34 + 5 * 2


def test_who_shares_only_a_part_waits_only_for_that() -> None:
    walk = make_walk(**SLOWLY)
    walk.submit([*PREFIX, *range(1, 20)], max_tokens=1)
    walk.submit([*PREFIX[:8], 40], max_tokens=1)
    walk.step()
    walk.step()
    assert walk.reason("r1") == "length", "its two blocks came with the first step, the first prompt needs seven"
    finish(walk)
    assert cached(walk) == [0, 8]


def test_others_pass_but_never_take_the_seats_of_those_who_wait() -> None:
    walk = make_walk(max_num_seqs=4, **SLOWLY)
    for number in range(3):
        walk.submit(prompt(number), max_tokens=4)
    for token in (37, 38):
        walk.submit([token], max_tokens=30)
    scheduler = walk.engine.scheduler
    walk.step()
    assert {seq.request.request_id for seq in scheduler.running} == {"r0", "r3"}
    assert scheduler.waiting.num_deferred == 2 and len(scheduler.waiting) == 3
    assert finish_order(walk)[:3] == ["r0", "r1", "r2"]
    walk.check_all((0,))


def test_different_salts_wait_for_nobody() -> None:
    walk = make_walk(max_num_batched_tokens=128)
    for number in range(3):
        walk.submit(prompt(number), max_tokens=1, cache_salt=str(number))
    walk.step()
    assert cached(walk) == [0, 0, 0] and walk.counts == [3 * 34]


def test_without_caching_nobody_waits() -> None:
    walk = make_walk(max_num_batched_tokens=128, enable_prefix_caching=False)
    for number in range(3):
        walk.submit(prompt(number), max_tokens=1)
    walk.step()
    assert walk.counts == [3 * 34]
    finish(walk)


def test_prompt_scores_wait_for_nobody_but_others_wait_for_them() -> None:
    walk = make_walk(max_num_batched_tokens=128, max_num_seqs=80)
    walk.submit(prompt(0), max_tokens=1)
    walk.submit(prompt(1), max_tokens=1, prompt_logprobs=1)
    walk.step()
    assert walk.counts == [2 * 34]
    walk.engine.reset_prefix_cache()
    walk.submit(prompt(2), max_tokens=1, prompt_logprobs=1)
    walk.submit(prompt(3), max_tokens=1)
    finish(walk)
    assert cached(walk) == [0, 0, 0, 32]


@pytest.mark.parametrize("event", ["abort", "preempt", "sleep"])
def test_nobody_waits_for_one_that_has_left(event: str) -> None:
    walk = make_walk(**SLOWLY)
    for number in range(3):
        walk.submit(prompt(number), max_tokens=1)
    walk.step()
    scheduler = walk.engine.scheduler
    assert [seq.request.request_id for seq in scheduler.running] == ["r0"] and scheduler.waiting.num_deferred == 2
    if event == "abort":
        walk.engine.abort("r0")
    elif event == "preempt":
        scheduler.preempt_all()
    else:
        walk.engine.pause()
        walk.engine.resume()
    assert not walk.engine.kv.in_flight
    finish(walk)
    # The next in order computes what is missing, and the others wait for that one.
    assert cached(walk)[1:] == ([8, 32] if event == "abort" else [32, 32])
    assert sum(walk.counts) == 34 + 2 + (8 if event == "sleep" else 0) + (0 if event == "abort" else 2)


def test_a_parked_request_can_be_aborted() -> None:
    walk = make_walk(**SLOWLY)
    for number in range(3):
        walk.submit(prompt(number), max_tokens=1)
    walk.step()
    walk.engine.abort("r1")
    assert walk.engine.scheduler.waiting.num_deferred == 1
    finish(walk)
    assert walk.reason("r1") == "abort" and walk.outputs["r2", 0][0].num_cached_tokens == 32


def test_a_lost_cache_only_costs_time() -> None:
    walk = make_walk(**SLOWLY)
    for number in range(3):
        walk.submit(prompt(number), max_tokens=2)
    for _ in range(3):
        walk.step()
        walk.engine.reset_prefix_cache()
    finish(walk)


def test_windows_share_too() -> None:
    engine = make_engine((0, 6), num_blocks=60, max_num_seqs=8, max_num_batched_tokens=32)
    walk = Walk(engine)
    for number in range(4):
        walk.submit(prompt(number), max_tokens=3)
    walk.finish()
    walk.check_all((0, 6))
    assert cached(walk) == [0] + [32] * 3
