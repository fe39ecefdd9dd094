"""A model with a recurrent state in the random walk: each sequence has a slot of its own, and begins from zero."""

from __future__ import annotations

import pytest
import torch
from engine_walk_cases import ORDERS, Walk, actions, make_engine, take_actions
from fake_model import FakeModel, fake_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from speculation_cases import FakeDrafter

from fuseline.compile.graph_inputs import StepOutput
from fuseline.compile.specs import StateSpec
from fuseline.engine.config import CacheConfig, SchedulerConfig
from fuseline.engine.memory.sizing import KVBudget, SizingError, size_cache
from fuseline.engine.memory.state_pool import StatePool
from fuseline.engine.run.device import HostDevice
from fuseline.engine.run.sampler_reference import reference_device
from fuseline.engine.run.warm_up import warm_up
from fuseline.engine.service import EngineService
from fuseline.engine.sleep import TAGS

PROMPT = list(range(1, 15))
EACH_ORDER = pytest.mark.parametrize("order", ORDERS)
WINDOWS = {"only states": (), "full": (0,), "mixed": (0, 6)}


@EACH_ORDER
@pytest.mark.parametrize("layout", WINDOWS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    actions=actions,
    num_blocks=st.integers(16, 30),
    num_states=st.integers(1, 12),
    policy=st.sampled_from(["fcfs", "priority"]),
    caching=st.booleans(),
    host=st.sampled_from([0, 60]),
)
def test_tokens_do_not_depend_on_what_happens_around(
    layout, order, actions, num_blocks, num_states, policy, caching, host
) -> None:
    windows = WINDOWS[layout]
    engine = make_engine(
        windows, num_blocks, None, host, num_states=num_states, scheduling_policy=policy, order=order,
        enable_prefix_caching=caching,
    )  # fmt: skip
    walk = Walk(engine)
    take_actions(walk, actions)
    walk.finish()
    walk.check_all(windows, with_state=True)


@EACH_ORDER
def test_no_more_run_than_there_are_slots(order) -> None:
    walk = Walk(make_engine(order=order, num_states=2, max_num_seqs=4))
    for number in range(5):
        walk.submit([number + 1, *PROMPT], max_tokens=6)
    seen = set()
    while walk.engine.has_work:
        walk.step()
        seen.add(len(walk.engine.scheduler.running))
    assert max(seen) == 2
    walk.check_all((0,), with_state=True)


@EACH_ORDER
def test_a_preempted_sequence_begins_anew_without_a_free_slot(order) -> None:
    walk = Walk(make_engine(order=order, num_states=1, max_num_seqs=1, scheduling_policy="priority"))
    walk.submit(PROMPT, max_tokens=12, priority=5)
    for _ in range(5):
        walk.step()
    walk.submit([9, 8], max_tokens=3, priority=1)
    walk.finish()
    assert walk.engine.scheduler.num_preemptions == 1
    assert sum(walk.counts) > 2 * len(PROMPT) + 12
    walk.check_all((0,), with_state=True)


def test_drafts_are_refused() -> None:
    with pytest.raises(ValueError, match="no drafts for this model"):
        make_engine(num_states=2, drafter=FakeDrafter())


def test_slots_are_held_once() -> None:
    pool = StatePool(3)
    slots = [pool.allocate() for _ in range(3)]
    assert sorted(slots) == [0, 1, 2] and pool.num_free == 0 and pool.num_held == 3
    pool.free(slots[1])
    assert pool.allocate() == slots[1]


def sized(num_bytes: int, windows=(0,), max_num_seqs=4, **cache):
    info = FakeModel(windows, with_state=True).info  # 16 bytes a state, 128 a block and layer
    assert info.state_specs == (StateSpec(len(windows), (4,), "float32"),)
    scheduler = SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=max_num_seqs)
    return size_cache(info, CacheConfig(block_size=4, **cache), scheduler, 64, KVBudget(num_bytes, num_bytes, ()))


def test_states_come_first_and_blocks_get_the_rest() -> None:
    size = sized(64 + 21 * 128, state_snapshot_share=0)
    assert (size.num_states, size.num_blocks, size.num_bytes) == (4, (20,), 64 + 21 * 128)
    assert dict(size.table)["recurrent states"].endswith("4 sequences") and "state snapshots" not in dict(size.table)
    size = sized(5000, max_num_seqs=1000, state_snapshot_share=0)
    assert size.num_states == 2500 // 16 and size.num_blocks == (18,), "no more than half of the memory"
    size = sized(40, windows=())
    assert (size.num_states, size.num_blocks, size.num_bytes) == (2, (), 32)


def test_snapshots_get_their_share_and_leave_one_sequence_its_blocks() -> None:
    num_bytes = 64 + 10 * 16 + 21 * 128
    size = sized(num_bytes, state_snapshot_share=0.06)
    assert (size.num_states, size.num_blocks, size.num_bytes) == (4 + 10, (20,), num_bytes)
    assert dict(size.table)["state snapshots"] == "0.0 MiB: 10 prefixes, more in states that no sequence uses"
    assert sized(num_bytes, enable_prefix_caching=False).num_states == 4
    assert sized(64 + 17 * 128).num_states == 4, "the blocks of one sequence come first"
    assert sized(64 + 17 * 128 + 32).num_states == 6
    assert sized(100_000).num_states == 4 + 16, "no more than four for each sequence"
    assert sized(2000, windows=(), state_snapshot_share=0.08).num_states == 4 + 10


def test_a_state_that_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(SizingError, match="the recurrent state of one sequence needs .*--gpu-memory-utilization"):
        sized(8, windows=())


def test_a_service_gives_the_model_its_slots() -> None:
    model = FakeModel(with_state=True)
    service = EngineService(fake_config(), lambda *_: model, reference_device, lambda message: None)
    assert len(model.states) == 4 + 16 and service.engine.kv.states.num_slots == 20, "four sequences, and snapshots"
    walk = Walk(service.engine)
    walk.submit(PROMPT, max_tokens=4)
    walk.finish()
    walk.check_all((0,), with_state=True)


def test_a_sleeping_engine_gives_its_states_back() -> None:
    model = FakeModel(with_state=True)
    service = EngineService(fake_config(), lambda *_: model, reference_device, lambda message: None)
    walk = Walk(service.engine)
    walk.submit(PROMPT, max_tokens=8)
    walk.step()
    service._sleep(1)
    assert len(model.states) == 1
    service._wake_up(TAGS)
    assert len(model.states) == 4 + 16
    walk.finish()
    walk.check_all((0,), with_state=True)


def test_the_profile_run_gives_each_sequence_a_slot() -> None:
    seen = []

    class Recorder:
        info = FakeModel(with_state=True).info

        def allocate_caches(self, num_blocks) -> None:
            seen.append(("blocks", list(num_blocks)))

        def allocate_states(self, num_slots: int) -> None:
            seen.append(("states", num_slots))

        def run(self, inputs) -> StepOutput:
            seen.append(inputs.state_slots.tolist())
            return StepOutput(torch.zeros(len(inputs.logits_rows), self.info.vocab_size))

    class Profiling(HostDevice):
        def profile(self, runs) -> int:
            for run in runs:
                run()
            return 0

    warm_up(Profiling(reference_device().ops), Recorder(), fake_config(max_num_seqs=3), lambda *_: None)
    assert seen[:2] == [("blocks", [1]), ("states", 3)]
    assert len(seen) > 5 and all(slots == list(range(len(slots))) for slots in seen[2:])
