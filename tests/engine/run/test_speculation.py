"""Drafts in the random walk: whatever is guessed, the tokens, their log-probabilities and endings stay the same."""

from __future__ import annotations

import numpy as np
import pytest
from engine_walk_cases import LAYOUTS, ORDERS, Walk, actions, make_engine, take_actions
from fake_model import BLOCK_SIZE, NAN_TOKEN, VOCAB_SIZE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from overlap_cases import REQUESTS, answers
from prometheus_client import CollectorRegistry
from speculation_cases import FakeDrafter

from fuseline.api.metrics import Metrics
from fuseline.engine.config import CacheConfig
from fuseline.engine.messages import EngineReady
from fuseline.engine.run.speculate.drafting import kept_positions
from fuseline.engine.state.scheduled_batch import ScheduledBatch

PROMPT = list(range(1, 15))
EACH_ORDER = pytest.mark.parametrize("order", ORDERS)


@EACH_ORDER
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    actions=actions,
    num_blocks=st.integers(16, 30),
    policy=st.sampled_from(["fcfs", "priority"]),
    caching=st.booleans(),
    threshold=st.sampled_from([None, 20]),
    host=st.sampled_from([0, 60]),
    wrong=st.integers(0, 6),
    token=st.sampled_from([None, NAN_TOKEN, VOCAB_SIZE, -1]),
)
def test_tokens_do_not_depend_on_drafts(
    layout, order, actions, num_blocks, policy, caching, threshold, host, wrong, token
) -> None:
    windows = LAYOUTS[layout]
    engine = make_engine(
        windows, num_blocks, threshold, host, scheduling_policy=policy, enable_prefix_caching=caching, order=order,
        drafter=FakeDrafter(windows, threshold, wrong, token),
    )  # fmt: skip
    walk = Walk(engine)
    take_actions(walk, actions)
    walk.finish()
    walk.check_all(windows, threshold)


def run_all(order: str, drafter: FakeDrafter | None, **config) -> Walk:
    walk = Walk(make_engine(order=order, drafter=drafter, **config))
    for params in REQUESTS.values():
        for temperature in (0.0, 0.3):
            walk.submit(PROMPT, **{"max_tokens": 18, "temperature": temperature, **params})
            walk.step()
    walk.submit([3, NAN_TOKEN, 4], max_tokens=5, n=2)
    walk.finish()
    return walk


@EACH_ORDER
@pytest.mark.parametrize("wrong", [0, 3])
@pytest.mark.parametrize("config", [{}, {"num_blocks": 17, "enable_prefix_caching": False}], ids=["plain", "few"])
def test_answers_are_those_without_drafts(order, wrong, config) -> None:
    """Penalties, masks, bad words, stop tokens inside a run of kept drafts, log-probabilities of each token."""
    without, walk = run_all("in_order", None, **config), run_all(order, FakeDrafter(wrong=wrong), **config)
    assert answers(walk) == answers(without)
    drafting = walk.engine.drafting
    assert 0 < drafting.num_accepted < drafting.num_drafts
    if config:
        assert walk.engine.scheduler.num_preemptions > 0


@EACH_ORDER
def test_right_drafts_save_steps_and_several_tokens_come_at_once(order) -> None:
    walk = Walk(make_engine(order=order, drafter=FakeDrafter()))
    name = walk.submit(PROMPT, max_tokens=21, temperature=0.0)
    walk.finish()
    walk.check_all((0,))
    assert walk.counts == [14, 5, 5, 5, 5], "the prompt's step gives a token, each other one five"
    stats = walk.engine.drafting
    assert (stats.num_drafts, stats.num_accepted) == (16, 16)
    lengths = [len(output.token_ids) for output in walk.outputs[name, 0]]
    assert lengths == [1] * 16 + [5], "compact deltas are a token each, the end is told with its whole run"


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("host", [0, 60])
@pytest.mark.parametrize("num_steps", range(1, 8))
def test_kept_drafts_cross_the_rope_threshold_while_their_sequence_is_evicted(order, host, num_steps) -> None:
    drafter = FakeDrafter(threshold=16)
    settings = {"scheduling_policy": "priority", "max_num_seqs": 1, "num_host_blocks": host}
    walk = Walk(make_engine(order=order, drafter=drafter, rope_threshold=16, **settings))
    walk.submit(PROMPT[:11], max_tokens=12, temperature=0.0, priority=5)
    for _ in range(num_steps):
        walk.step()
    walk.submit([9, 8], max_tokens=2, priority=1)
    walk.finish()
    walk.check_all((0,), 16)


def test_drafts_are_counted_for_the_metrics() -> None:
    walk = Walk(make_engine(drafter=FakeDrafter(wrong=3)))
    ready = EngineReady(48, 64, 40, 4, "float32", "float32", (0,), "Fake")
    registry = CollectorRegistry()
    metrics = Metrics("fuseline:", "fake", ready, CacheConfig(), registry)
    walk.submit(PROMPT, max_tokens=20, temperature=0.0)
    while walk.engine.has_work:
        metrics.on_step(walk.engine.step())
    drafting = walk.engine.drafting

    def value(name: str) -> float:
        return registry.get_sample_value(f"fuseline:spec_decode_{name}", {"model_name": "fake"})

    counts = [value(f"num_{name}_tokens_total") for name in ("draft", "accepted", "emitted")]
    assert counts == [drafting.num_drafts, drafting.num_accepted, drafting.num_emitted]
    assert 0 < drafting.num_accepted < drafting.num_drafts
    # The first token comes with the prompt, the last one may come without a draft; all others are emitted.
    assert 18 <= drafting.num_emitted <= 19
    num_verified = drafting.num_emitted - drafting.num_accepted
    assert value("draft_acceptance_rate") == drafting.num_accepted / drafting.num_drafts
    assert value("efficiency") == drafting.num_emitted / (drafting.num_drafts + num_verified)


@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_no_draft_reaches_beyond_the_end(max_tokens) -> None:
    walk = Walk(make_engine(drafter=FakeDrafter()))
    walk.submit(PROMPT, max_tokens=max_tokens, temperature=0.0, logprobs=1)
    walk.finish()
    walk.check_all((0,))
    assert sum(walk.counts) <= len(PROMPT) + max_tokens - 1


def test_wrong_drafts_cost_no_more_than_their_positions() -> None:
    walk = Walk(make_engine(drafter=FakeDrafter(wrong=1)))
    walk.submit(PROMPT, max_tokens=9, temperature=0.0)
    walk.finish()
    walk.check_all((0,))
    assert walk.engine.drafting.num_accepted == 0 and len(walk.counts) == 9


@EACH_ORDER
def test_only_verified_tokens_are_found_in_the_prefix_cache(order) -> None:
    walk = Walk(make_engine(order=order, drafter=FakeDrafter(wrong=3), num_blocks=60))
    name = walk.submit(PROMPT, max_tokens=30, temperature=0.0)
    while walk.engine.has_work:
        walk.step()
        for seq in walk.engine.scheduler.running:
            assert seq.num_committed * BLOCK_SIZE <= len(seq.tokens)
    whole = [*PROMPT, *walk.tokens(name)]
    again = walk.submit(whole, max_tokens=1)
    walk.finish()
    assert walk.outputs[again, 0][0].num_cached_tokens == (len(whole) - 1) // BLOCK_SIZE * BLOCK_SIZE
    walk.check_all((0,))


def test_streams_with_drafts_do_not_take_the_place_of_others() -> None:
    """Drafts use what is left of the token budget; nobody is preempted for them."""
    walk = Walk(make_engine(drafter=FakeDrafter(), max_num_batched_tokens=6, max_num_seqs=4))
    for number in range(4):
        walk.submit([number + 1, 2, 3], max_tokens=12, temperature=0.0)
    walk.finish()
    walk.check_all((0,))
    assert max(walk.counts) <= 6 and walk.engine.scheduler.num_preemptions == 0


def test_positions_are_kept_up_to_the_first_wrong_draft() -> None:
    sampling, drafts = np.array([0, 0, 0, 1, 2, 2]), np.array([5, 6, -1, -1, 7, -1])
    nothing = np.zeros(0, np.int64)
    batch = ScheduledBatch(nothing, nothing, nothing, nothing, sampling, sampling, nothing, [], 0)
    ok = np.ones(6, bool)
    for tokens, expected in (
        ([5, 6, 9, 1, 7, 2], [1, 1, 1, 1, 1, 1]),
        ([4, 6, 9, 1, 7, 2], [1, 0, 0, 1, 1, 1]),
        ([5, 4, 9, 1, 8, 2], [1, 1, 0, 1, 1, 0]),
    ):
        assert kept_positions(batch, drafts, np.array(tokens), ok).tolist() == [bool(k) for k in expected]
    ok[1] = False
    kept = kept_positions(batch, drafts, np.array([5, 6, 9, 1, 7, 2]), ok)
    assert kept.tolist() == [True, True, False, True, True, True], "a position without a token is the last"
