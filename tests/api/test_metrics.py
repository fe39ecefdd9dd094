"""Each metric of the engine against what was made to happen."""

from __future__ import annotations

import asyncio
import time

import pytest
from fake_model import NAN_TOKEN
from served_fake import Fake, served_fake, until

from fuseline.api.errors import ApiError
from fuseline.api.metrics import SLEEP_STATES, WAITING_REASONS

PROMPT = list(range(1, 15))
LATENCIES = ("queue_time", "inference_time", "prefill_time", "decode_time")


def seconds(fake: Fake, name: str) -> float:
    return fake.value(f"request_{name}_seconds_sum")


async def test_time_in_a_forced_queue() -> None:
    async with served_fake(0.01, max_num_seqs=1) as fake:
        start = time.time()
        first = asyncio.create_task(fake.collect(PROMPT, max_tokens=40, seed=1))
        await until(lambda: fake.value("num_requests_running") == 1)
        assert seconds(fake, "queue_time") == 0
        second = asyncio.create_task(fake.collect([9, 8], max_tokens=2, seed=1))
        await until(lambda: fake.value("num_requests_waiting") == 1)
        await first
        waited_at_least = 0.1
        await second
        whole = time.time() - start
        assert waited_at_least < seconds(fake, "queue_time") < whole
        assert fake.value("request_queue_time_seconds_count") == 2
        assert fake.value("time_in_queue_requests_sum") == seconds(fake, "queue_time")
        end_to_end = fake.value("e2e_request_latency_seconds_sum")
        assert end_to_end == pytest.approx(seconds(fake, "queue_time") + seconds(fake, "inference_time"), abs=0.02)
        assert seconds(fake, "inference_time") == pytest.approx(
            seconds(fake, "prefill_time") + seconds(fake, "decode_time"), abs=0.02
        )
        first_tokens = fake.value("time_to_first_token_seconds_sum")
        assert first_tokens == pytest.approx(seconds(fake, "queue_time") + seconds(fake, "prefill_time"), abs=0.02)
        assert seconds(fake, "decode_time") >= 38 * 0.01
        assert fake.value("num_requests_running") == fake.value("num_requests_waiting") == 0


async def test_without_a_queue_there_is_no_queue_time() -> None:
    async with served_fake() as fake:
        await fake.collect(PROMPT, max_tokens=3, seed=1)
        assert seconds(fake, "queue_time") < 0.5 and fake.value("request_queue_time_seconds_count") == 1


async def test_a_request_without_tokens_has_a_queue_time_and_no_first_token() -> None:
    async with served_fake() as fake:
        await fake.collect(PROMPT, max_tokens=0, prompt_logprobs=1)
        assert fake.value("request_queue_time_seconds_count") == 1
        assert fake.value("request_inference_time_seconds_count") == 1
        assert fake.value("time_to_first_token_seconds_count") == 0


async def test_aborts_in_the_queue_and_while_running() -> None:
    async with served_fake(0.02, max_num_seqs=1) as fake:
        running = asyncio.create_task(fake.collect(PROMPT, max_tokens=45, seed=1))
        await until(lambda: fake.value("num_requests_running") == 1)
        queued = asyncio.create_task(fake.collect([5], max_tokens=2))
        await until(lambda: fake.value("num_requests_waiting") == 1)
        queued.cancel()
        await until(lambda: fake.value("num_requests_waiting") == 0)
        assert fake.value("num_requests_running") == 1 and fake.value("kv_cache_usage_perc") > 0
        running.cancel()
        await until(lambda: fake.value("num_requests_running") == 0)
        assert fake.value("request_success_total", finished_reason="abort") == 2
        assert fake.value("kv_cache_usage_perc") == 0
        assert fake.value("request_queue_time_seconds_count") == 1, "the other one never left the queue"


async def test_prefix_hits_and_queries() -> None:
    async with served_fake() as fake:
        await fake.collect(PROMPT, max_tokens=2, seed=1)
        assert (fake.value("prefix_cache_queries_total"), fake.value("prefix_cache_hits_total")) == (14, 0)
        await fake.collect(PROMPT, max_tokens=2, seed=1, n=2)
        assert (fake.value("prefix_cache_queries_total"), fake.value("prefix_cache_hits_total")) == (28, 12)
        assert fake.value("gpu_prefix_cache_hit_rate") == pytest.approx(12 / 28)
        assert fake.value("prompt_tokens_cached_total") == 12
        await fake.client.reset_prefix_cache()
        await fake.collect(PROMPT, max_tokens=2, seed=1)
        assert (fake.value("prefix_cache_queries_total"), fake.value("prefix_cache_hits_total")) == (42, 12)


async def test_forced_preemptions_and_tokens() -> None:
    async with served_fake(num_gpu_blocks_override=16) as fake:
        jobs = [fake.collect([k, *PROMPT], max_tokens=40, seed=k) for k in range(1, 5)]
        usages = []
        fake.client.on_step.append(lambda step: usages.append(step.stats.kv_usage))
        await asyncio.gather(*jobs)
        computed = sum(map(sum, fake.shapes))
        assert fake.value("num_preemptions_total") > 0 and computed > 4 * (15 + 39)
        assert fake.value("request_num_preemptions_sum") == fake.value("num_preemptions_total")
        assert fake.value("request_num_preemptions_count") == 4
        assert fake.value("cpu_prefix_cache_hit_rate") == 0, "nothing is swapped"
        assert fake.value("iteration_tokens_total_sum") == computed
        assert fake.value("iteration_tokens_total_count") == len(fake.shapes)
        assert max(usages) > 0.8 and fake.value("kv_cache_usage_perc") == 0
        assert fake.value("prompt_tokens_total") == 60 and fake.value("generation_tokens_total") == 160
        assert fake.value("tokens_total") == 220
        assert fake.value("request_success_total", finished_reason="length") == 4
        assert fake.value("prefix_cache_queries_total") == 60, "a request is looked up once, preempted or not"
        assert fake.value("inter_token_latency_seconds_count") == 4 * 39


async def test_forced_swapping() -> None:
    settings = {"preemption_mode": "swap", "swap_space": 1e-6, "num_gpu_blocks_override": 16}
    async with served_fake(**settings) as fake:
        seen = []
        fake.client.on_step.append(
            lambda step: seen.append((fake.value("num_requests_swapped"), fake.value("cpu_cache_usage_perc")))
        )
        await asyncio.gather(*(fake.collect([k, *PROMPT], max_tokens=40, seed=k) for k in range(1, 5)))
        assert any(count > 0 and usage > 0 for count, usage in seen)
        assert all((count > 0) == (usage > 0) and usage <= 1 for count, usage in seen)
        assert fake.value("num_requests_swapped") == fake.value("cpu_cache_usage_perc") == 0
        assert fake.value("num_preemptions_total") > 0
        # Host memory has room for one of the preempted sequences: the others are computed anew.
        assert 0 < fake.value("cpu_prefix_cache_hit_rate") < 1


async def test_who_waits_for_what() -> None:
    def waiting(fake: Fake) -> dict[str, float]:
        return {why: fake.value("num_requests_waiting_by_reason", reason=why) for why in WAITING_REASONS}

    async with served_fake(0.03, max_num_seqs=2) as fake:
        seen: list[dict[str, float]] = []
        fake.client.on_step.append(lambda step: seen.append(waiting(fake)))
        prompt = list(range(1, 41))  # three steps: the second request has come when the last of them has room for it
        same = [asyncio.create_task(fake.collect(prompt, max_tokens=20, seed=k)) for k in range(2)]
        await until(lambda: fake.value("num_requests_running") == 2)
        assert {"capacity": 0, "deferred": 1, "asleep": 0} in seen, "the prompt is the same: one computes it"
        third = asyncio.create_task(fake.collect([9], max_tokens=2, seed=1))
        await until(lambda: waiting(fake) == {"capacity": 1, "deferred": 0, "asleep": 0})
        await fake.client.sleep(1)
        await until(lambda: waiting(fake) == {"capacity": 0, "deferred": 0, "asleep": 3})
        await fake.client.wake_up()
        await asyncio.gather(*same, third)
        assert waiting(fake) == {"capacity": 0, "deferred": 0, "asleep": 0}


async def test_the_state_of_a_sleeping_engine() -> None:
    def state(fake: Fake) -> str:
        (found,) = (name for name in SLEEP_STATES.values() if fake.value("engine_sleep_state", sleep_state=name))
        return found

    async with served_fake() as fake:
        assert state(fake) == "awake"
        for level in (0, 1, 2):
            await fake.client.sleep(level)
            await until(lambda level=level: state(fake) == SLEEP_STATES[level])
        await fake.client.wake_up(["weights"])
        assert state(fake) == "discard_all", "the KV cache is still missing"
        await fake.client.wake_up()
        await until(lambda: state(fake) == "awake")


async def test_the_longest_choice_of_a_request() -> None:
    async with served_fake() as fake:
        await fake.collect(PROMPT, max_tokens=5, temperature=0, n=3)
        await fake.collect(PROMPT, max_tokens=7, seed=1)
        assert fake.value("request_max_num_generation_tokens_sum") == 5 + 7
        assert fake.value("request_max_num_generation_tokens_count") == 2
        assert fake.value("request_generation_tokens_sum") == 3 * 5 + 7


@pytest.mark.parametrize("caching", [False, True], ids=["forgotten", "reused"])
async def test_how_long_blocks_keep_their_content(caching: bool) -> None:
    """14 tokens and two computed ones fill four blocks, of which a cache keeps those that are full."""
    async with served_fake(enable_prefix_caching=caching, num_gpu_blocks_override=16) as fake:
        begin = time.monotonic()
        await fake.collect(PROMPT, max_tokens=3, seed=1)
        await until(lambda: fake.value("kv_cache_usage_perc") == 0)
        assert fake.value("kv_block_lifetime_seconds_count") == (0 if caching else 4)
        for first in range(20, 26):  # takes all blocks in turn
            await fake.collect([first] * 30, max_tokens=3, seed=1)
        assert fake.value("kv_block_lifetime_seconds_count") >= 4
        assert 0 < fake.value("kv_block_lifetime_seconds_sum") < 64 * (time.monotonic() - begin)


async def test_every_request_has_one_time_to_first_token() -> None:
    async with served_fake(max_num_seqs=2) as fake:
        await asyncio.gather(*(fake.collect([k, *PROMPT], max_tokens=3, seed=k, n=1 + k % 2) for k in range(6)))
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
            assert fake.value(f"{name}_count") == 6
        assert fake.value("request_success_total", finished_reason="length") == 9
        assert fake.value("generation_tokens_total") == 27 and fake.value("prompt_tokens_total") == 6 * 15


async def test_the_log_line_tells_of_what_happened(caplog) -> None:
    async with served_fake(0.003) as fake:
        fake.metrics.log_line()
        assert not caplog.records, "nothing has happened"
        job = asyncio.create_task(fake.collect(PROMPT, max_tokens=40, seed=1))
        await until(lambda: fake.value("num_requests_running") == 1)
        with caplog.at_level("INFO", "fuseline.stats"):
            fake.metrics.log_line()
        assert "running 1, waiting 0, swapped 0" in caplog.text and "prompt 0.0 tokens/s" not in caplog.text
        await job


async def test_who_is_preempted_before_it_computes_is_looked_up_once() -> None:
    settings = {"scheduling_policy": "priority", "max_num_seqs": 2, "num_gpu_blocks_override": 17}
    async with served_fake(0.003, **settings) as fake:
        low = [asyncio.create_task(fake.collect([k] * 30, max_tokens=4, seed=k, priority=5)) for k in (1, 2)]
        high = [asyncio.create_task(fake.collect([k] * 30, max_tokens=4, seed=k, priority=1)) for k in (3, 4)]
        await asyncio.gather(*low, *high)
        assert fake.value("prefix_cache_queries_total") == 4 * 30
        assert fake.value("request_queue_time_seconds_count") == 4


async def test_errors_are_counted_as_such() -> None:
    async with served_fake() as fake:
        with pytest.raises(ApiError) as failed:
            await fake.collect([3, NAN_TOKEN], max_tokens=4)
        assert failed.value.status == 500
        with pytest.raises(ApiError) as failed:
            await fake.collect(PROMPT, max_tokens=4, allowed_token_ids=(4,), bad_words=((4,),))
        assert failed.value.status == 400 and "no token is left" in failed.value.message
        assert fake.value("request_success_total", finished_reason="error") == 2
        assert fake.value("request_success_total", finished_reason="abort") == 0


async def test_a_sleeping_engine_runs_nothing_and_counts_who_waits() -> None:
    async with served_fake(0.003) as fake:
        job = asyncio.create_task(fake.collect(PROMPT, max_tokens=30, seed=1))
        await until(lambda: fake.value("num_requests_running") == 1)
        await fake.client.sleep(1)
        await until(lambda: fake.value("num_requests_waiting") == 1)
        assert fake.value("num_requests_running") == 0 and fake.value("kv_cache_usage_perc") == 0
        late = asyncio.create_task(fake.collect([5], max_tokens=2))
        await until(lambda: fake.value("num_requests_waiting") == 2)
        await fake.client.wake_up()
        await asyncio.gather(job, late)
        assert fake.value("num_requests_waiting") == 0


async def test_an_engine_that_is_gone_runs_nothing() -> None:
    async with served_fake(0.003) as fake:
        job = asyncio.create_task(fake.collect(PROMPT, max_tokens=60, seed=1))
        await until(lambda: fake.value("num_requests_running") == 1)
        await fake.client.shutdown(5)
        with pytest.raises(Exception, match="shut down|died"):
            await job
        await until(lambda: fake.value("num_requests_running") == 0)
        assert fake.value("request_success_total", finished_reason="error") == 1
