"""Promises of the scheduler beyond equal tokens: order, fairness, limits, sharing, what is recomputed."""

from __future__ import annotations

import pytest
from engine_walk_cases import Walk, expected_tokens, make_engine
from scheduler_cases import finish_order

from fuseline.engine.schedule.scheduler import MOST_TURNS

PROMPT = list(range(1, 15))


def first_step_of(walk: Walk, name: str) -> int:
    for count in range(200):
        if (name, 0) in walk.outputs:
            return count
        walk.step()
    raise AssertionError(f"{name} never got a token")


def test_fcfs_serves_in_order_of_arrival() -> None:
    walk = Walk(make_engine(max_num_seqs=1))
    for _ in range(4):
        walk.submit(PROMPT, max_tokens=3)
    assert finish_order(walk) == ["r0", "r1", "r2", "r3"]


def test_the_rest_of_a_batch_stands_back_behind_what_comes_later() -> None:
    walk = Walk(make_engine(max_num_seqs=1))
    for turn in (0, 100, 200, 300):
        walk.submit(PROMPT, max_tokens=3, turn=turn)
    walk.submit(PROMPT, max_tokens=3)
    assert finish_order(walk) == ["r0", "r4", "r1", "r2", "r3"]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_batch_gives_a_row_to_what_comes_later(policy: str) -> None:
    """But not what came by itself, and not to its own later prompts; all tokens stay."""
    walk = Walk(make_engine(max_num_seqs=2, scheduling_policy=policy))
    for turn in (0, 100, 200):
        walk.submit(PROMPT, max_tokens=20, turn=turn)
    for _ in range(6):
        walk.step()
    assert walk.engine.scheduler.num_preemptions == 0
    walk.submit(PROMPT, max_tokens=20)
    walk.submit(PROMPT, max_tokens=3)
    before = len(walk.tokens("r0"))
    assert first_step_of(walk, "r3") <= 2 and len(walk.tokens("r0")) > before
    assert walk.engine.scheduler.num_preemptions == 1
    assert finish_order(walk)[-2:] == ["r1", "r2"]
    walk.check_all((0,))


def test_few_prompts_of_a_batch_start_in_a_step() -> None:
    """Whatever there is room for: who comes meanwhile waits for one such step. All are served."""
    walk = Walk(make_engine(num_blocks=400, max_num_seqs=200, max_num_batched_tokens=400))
    for turn in range(150):
        walk.submit([3, turn % 40], max_tokens=2, turn=turn)
    walk.step()
    assert walk.counts == [2 * (1 + MOST_TURNS)]
    walk.submit(PROMPT, max_tokens=1)
    walk.step()
    assert walk.reason("r150") == "length" and len(walk.engine.requests.live) > 10
    walk.finish()
    walk.check_all((0,))


def test_priority_serves_lower_values_first_and_ties_by_arrival() -> None:
    walk = Walk(make_engine(max_num_seqs=1, scheduling_policy="priority"))
    for priority in (1, 0, 1, -1, 0):
        walk.submit(PROMPT, max_tokens=3, priority=priority)
    assert finish_order(walk) == ["r3", "r1", "r4", "r0", "r2"]


def test_priority_preempts_running_work_and_its_tokens_stay() -> None:
    walk = Walk(make_engine(max_num_seqs=1, scheduling_policy="priority"))
    walk.submit(PROMPT, max_tokens=20, priority=5)
    for _ in range(6):
        walk.step()
    walk.submit(PROMPT, max_tokens=3, priority=1)
    assert finish_order(walk) == ["r1", "r0"]
    assert walk.engine.scheduler.num_preemptions == 1
    walk.check_all((0,))


def test_few_blocks_preempt_the_latest_and_tokens_stay() -> None:
    walk = Walk(make_engine(num_blocks=16))
    for _ in range(4):
        walk.submit(PROMPT, max_tokens=40, cache_salt=str(len(walk.requests)))
    assert finish_order(walk)[0] == "r0"
    assert walk.engine.scheduler.num_preemptions > 0
    walk.check_all((0,))


def test_long_prompt_does_not_stop_a_stream() -> None:
    walk = Walk(make_engine())
    walk.submit([5], max_tokens=20)
    walk.step()
    walk.submit([6] * 60, max_tokens=2)
    for count in range(2, 6):
        walk.step()
        assert len(walk.tokens("r0")) == count
    assert max(walk.counts) == 16


def test_prompts_take_a_share_of_a_step_beside_the_streams() -> None:
    walk = Walk(make_engine(chunked_prefill_size=4))
    walk.submit([5], max_tokens=20)
    walk.step()
    for token in (6, 7, 8):
        walk.submit([token] * 6, max_tokens=3)
    for _ in range(5):
        walk.step()
    # Beside one stream, then beside two and three; then the second has ended and the last prompt has two tokens left.
    assert walk.counts[1:6] == [1 + 4, 1 + 4, 2 + 4, 3 + 4, 2 + 2]
    walk.finish()
    walk.check_all((0,))


def test_short_prompt_overtakes_a_long_one() -> None:
    settings = {"max_num_partial_prefills": 2, "max_long_partial_prefills": 1, "long_prefill_token_threshold": 4}
    walk = Walk(make_engine(**settings))
    for prompt in ([6] * 50, [7] * 50, [8, 9]):
        walk.submit(prompt, max_tokens=2)
    assert finish_order(walk) == ["r2", "r0", "r1"]


def test_a_prompt_of_half_a_step_waits_for_no_long_one() -> None:
    """It starts in the next step, and the running long prompt computes the rest of that step."""
    walk = Walk(make_engine(chunked_prefill_size=8, max_num_seqs=8))
    walk.submit([6] * 60, max_tokens=2)
    walk.step()
    for token in (7, 8, 9):
        walk.submit([token] * 60, max_tokens=2)
    walk.submit([3, 2, 1], max_tokens=2)
    long = walk.engine.scheduler.running[0]
    before = long.num_computed
    walk.step()
    assert walk.counts[-1] == 8 and ("r4", 0) in walk.outputs
    assert long.num_computed == before + 8 - 3
    assert finish_order(walk) == ["r4", "r0", "r1", "r2", "r3"]
    walk.check_all((0,))


def test_a_flood_of_short_prompts_leaves_a_long_one_half_of_each_step() -> None:
    walk = Walk(make_engine(chunked_prefill_size=8, max_num_seqs=32, num_blocks=400))
    walk.submit([6] * 60, max_tokens=1)
    walk.step()
    for token in range(40):
        walk.submit([token + 1] * 4, max_tokens=1)
    assert first_step_of(walk, "r0") <= 60 // 4
    walk.finish()
    walk.check_all((0,))


def test_a_short_prompt_waits_for_no_crowd_of_long_ones_with_little_left() -> None:
    """Long prompts of which the cache has nearly all would fill step after step."""
    walk = Walk(make_engine(chunked_prefill_size=8, max_num_seqs=40, num_blocks=400))
    walk.submit([6] * 60, max_tokens=1)
    walk.finish()
    for token in range(30):
        walk.submit([6] * 57 + [token, 1, 2], max_tokens=1)
    walk.submit([3, 2, 1], max_tokens=1)
    assert first_step_of(walk, "r31") == 1
    assert "r1" in {name for name, _ in walk.outputs}, "the first of the crowd has its part of that step"
    walk.finish()
    walk.check_all((0,))


def test_nobody_passes_a_prompt_that_waits_for_blocks() -> None:
    """Short ones would take each block that gets free."""
    walk = Walk(make_engine(num_blocks=15, chunked_prefill_size=8, max_num_seqs=16))
    walk.submit([6] * 52, max_tokens=8)
    first_step_of(walk, "r0")
    walk.submit([7] * 50, max_tokens=1)
    for token in range(12):
        walk.submit([token + 8] * 4, max_tokens=1)
    scheduler = walk.engine.scheduler
    while "r1" not in {seq.request.request_id for seq in scheduler.running}:
        assert {name for name, _ in walk.outputs} == {"r0"}
        walk.step()
    walk.finish()
    walk.check_all((0,))


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_prompt_whose_tokens_are_scored_takes_half_as_many_in_a_step(is_chunked: bool) -> None:
    walk = Walk(make_engine(chunked_prefill_size=8 if is_chunked else 0, enable_chunked_prefill=is_chunked,
                            max_num_batched_tokens=64, max_num_seqs=8))  # fmt: skip
    walk.submit([6] * 21, max_tokens=1, prompt_logprobs=2)
    walk.submit([7] * 21, max_tokens=1, prompt_logprobs=2)
    walk.step()
    assert walk.counts == [4 if is_chunked else 42]
    walk.finish()
    walk.check_all((0,))


@pytest.mark.parametrize("settings", [{"scheduling_policy": "priority"}, {"enable_chunked_prefill": False}], ids=str)
def test_nobody_passes_under_priorities_or_without_chunks(settings: dict) -> None:
    walk = Walk(make_engine(max_num_seqs=8, max_num_batched_tokens=64, **settings))
    for prompt in ([6] * 60, [7] * 60, [3, 2, 1]):
        walk.submit(prompt, max_tokens=1)
    assert finish_order(walk) == ["r0", "r1", "r2"]


def test_prompts_of_a_body_do_not_pass() -> None:
    walk = Walk(make_engine(chunked_prefill_size=8, max_num_seqs=8))
    walk.submit([6] * 60, max_tokens=1)
    walk.step()
    for turn, prompt in enumerate(([7] * 60, [3, 2, 1], [4, 5])):
        walk.submit(prompt, max_tokens=1, turn=turn)
    assert finish_order(walk) == ["r0", "r1", "r2", "r3"]


def test_one_partial_prefill_at_a_time_by_default() -> None:
    walk = Walk(make_engine())
    for token in (6, 7, 8):
        walk.submit([token] * 40, max_tokens=1)
    while walk.engine.has_work:
        walk.step()
        partial = [s for s in walk.engine.scheduler.running if s.num_remaining > 1]
        assert len(partial) <= 1


def test_without_chunks_a_prompt_is_computed_whole() -> None:
    walk = Walk(make_engine(enable_chunked_prefill=False, max_num_batched_tokens=64))
    for count in (40, 30, 20):
        walk.submit([count] * count, max_tokens=1)
    walk.finish()
    assert walk.counts == [40, 50], "the second waits for a step it fits in, and nobody passes it"
    walk.check_all((0,))


def test_choices_share_the_prompt() -> None:
    for caching in (True, False):
        walk = Walk(make_engine(enable_prefix_caching=caching, max_num_seqs=8))
        name = walk.submit(PROMPT, n=4, max_tokens=6)
        walk.step()
        walk.step()
        used = walk.engine.kv.groups[0].pool.num_used
        assert used == 3 + 4, "three full prompt blocks once, one block for each choice"
        walk.finish()
        walk.check_all((0,))
        assert len({tuple(walk.tokens(name, index)) for index in range(4)}) == 4
        assert walk.engine.scheduler.prefix_hits == 0


def test_greedy_choices_are_computed_once() -> None:
    walk = Walk(make_engine())
    name = walk.submit(PROMPT, n=3, max_tokens=5, temperature=0.0)
    walk.finish()
    assert sum(walk.counts) == len(PROMPT) + 4
    assert {index: walk.reason(name, index) for index in range(3)} == {0: "length", 1: "length", 2: "length"}
    walk.check_all((0,))


def test_prefix_is_reused_but_never_across_salts() -> None:
    walk = Walk(make_engine())
    for salt in ("", "", "other", "other"):
        walk.submit(PROMPT, max_tokens=1, cache_salt=salt)
        walk.finish()
    cached = [walk.outputs[f"r{index}", 0][0].num_cached_tokens for index in range(4)]
    assert cached == [0, 12, 0, 12]
    assert walk.engine.scheduler.prefix_queries == 4 * 14 and walk.engine.scheduler.prefix_hits == 24


def test_whole_prompt_in_the_cache_still_computes_a_token() -> None:
    walk = Walk(make_engine())
    for _ in range(2):
        walk.submit(PROMPT[:8], max_tokens=2)
        walk.finish()
    assert walk.outputs["r1", 0][0].num_cached_tokens == 4
    walk.check_all((0,))


@pytest.mark.parametrize("windows", [(0,), (0, 6)])
def test_crossing_the_rope_threshold_recomputes(windows) -> None:
    walk = Walk(make_engine(windows, rope_threshold=16))
    name = walk.submit(PROMPT, max_tokens=12)
    walk.finish()
    assert walk.tokens(name) == expected_tokens(walk.requests[name], 0, windows, 16)
    assert sum(walk.counts) == (14 + 2) + 17 + 8
    assert walk.engine.scheduler.num_preemptions == 0


def test_window_group_holds_no_more_than_its_window() -> None:
    engine = make_engine((6,))
    walk = Walk(engine)
    walk.submit([5], max_tokens=50)
    while engine.has_work:
        walk.step()
        assert engine.kv.groups[0].pool.num_used <= 3
    walk.check_all((6,))


def test_abort_frees_everything_at_once() -> None:
    engine = make_engine()
    walk = Walk(engine)
    name = walk.submit(PROMPT, n=2, max_tokens=30)
    walk.step()
    engine.abort(name)
    assert engine.kv.usage == 0
    walk.finish()
    assert [walk.reason(name, index) for index in range(2)] == ["abort", "abort"]
