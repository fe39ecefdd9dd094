"""Prometheus metrics (SPEC 18) and the log line every ten seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fuseline.engine.config import CacheConfig
from fuseline.engine.messages import AWAKE, EngineReady, StepOutputs, StepStats, StepTimes, TokenOutput

LOG = logging.getLogger("fuseline.stats")
LOG_SECONDS = 10.0
TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8096)
PREEMPTIONS = (0, 1, 2, 5, 10, 20, 50)
STEP_TIMES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 60000)
LIFETIMES = (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800)
SLEEP_STATES = {AWAKE: "awake", 0: "paused", 1: "weights_offloaded", 2: "discard_all"}
"""Sleep level -> value of the label sleep_state."""
WAITING_REASONS = ("capacity", "deferred", "asleep")
"""No room in the batch or the KV cache; a running request computes its prefix; the engine sleeps."""


def one_two_five(limit: int) -> Iterator[int]:
    """1, 2, 5, 10, ... up to `limit`."""
    step = 1
    while True:
        for digit in (1, 2, 5):
            if digit * step > limit:
                return
            yield digit * step
        step *= 10


class Metrics:
    """All series of one server; fed by engine steps and finished requests."""

    def __init__(
        self,
        prefix: str,
        model_name: str,
        ready: EngineReady,
        cache: CacheConfig,
        registry: CollectorRegistry,
        traced: Set[str] = frozenset(),
    ) -> None:
        """`traced`: modules whose times the engine tells, model and worker."""
        self._registry = registry
        self._prefix, self._model = prefix, model_name
        self._seen = StepStats()
        self._prompt_seen = self._generated_seen = 0
        self._prompt_count = self._generated_count = 0
        self._logged = time.monotonic()
        self._make_engine_series()
        self._make_cache_series(ready, cache)
        self._make_speculation_series()
        self._make_request_series(ready.max_model_len)
        self._make_step_series(traced)

    def _series(self, kind: type, name: str, text: str, labels: Sequence[str] = (), **options):
        made = kind(self._prefix + name, text, ("model_name", *labels), registry=self._registry, **options)
        return made if labels else made.labels(self._model)

    def _make_engine_series(self) -> None:
        self.running = self._series(Gauge, "num_requests_running", "Requests in the running batch")
        self.waiting = self._series(Gauge, "num_requests_waiting", "Requests that wait")
        self.swapped = self._series(Gauge, "num_requests_swapped", "Requests swapped to host memory")
        waiting = self._series(Gauge, "num_requests_waiting_by_reason", "Requests that wait, by reason", ("reason",))
        self._waiting_by_reason = {reason: waiting.labels(self._model, reason) for reason in WAITING_REASONS}
        states = self._series(Gauge, "engine_sleep_state", "1 for the state that the engine is in", ("sleep_state",))
        self._sleep_states = {level: states.labels(self._model, name) for level, name in SLEEP_STATES.items()}
        self._sleep_states[AWAKE].set(1)
        self._preemptions = self._series(Counter, "num_preemptions", "Preempted requests")
        self._step_tokens = self._series(Histogram, "iteration_tokens_total", "Tokens of a step", buckets=STEP_TOKENS)

    def _make_cache_series(self, ready: EngineReady, cache: CacheConfig) -> None:
        self._usage = [
            self._series(Gauge, name, "Share of KV blocks in use")
            for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc")
        ]
        self._swap_usage = self._series(Gauge, "cpu_cache_usage_perc", "Share of host swap in use")
        self._hit_rate = self._series(
            Gauge, "gpu_prefix_cache_hit_rate", "Share of prompt tokens found in the prefix cache"
        )
        self._host_hit_rate = self._series(
            Gauge, "cpu_prefix_cache_hit_rate", "Share of the tokens of preempted requests found in host memory"
        )
        self._queries = self._series(Counter, "prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._hits = self._series(Counter, "prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self._lifetimes = self._series(
            Histogram, "kv_block_lifetime_seconds", "Time for which blocks keep their content", buckets=LIFETIMES
        )
        facts = {
            **asdict(cache), "cache_dtype": ready.kv_cache_dtype, "num_gpu_blocks": ready.num_blocks,
            "num_cpu_blocks": ready.num_host_blocks, "block_size": ready.block_size,
        }  # fmt: skip
        info = self._series(Gauge, "cache_config_info", "KV cache configuration", sorted(facts))
        info.labels(self._model, *(facts[name] for name in sorted(facts))).set(1)

    def _make_speculation_series(self) -> None:
        self._drafts = self._series(Counter, "spec_decode_num_draft_tokens", "Draft tokens computed")
        self._accepted = self._series(Counter, "spec_decode_num_accepted_tokens", "Draft tokens kept")
        self._emitted = self._series(
            Counter, "spec_decode_num_emitted_tokens", "Tokens that steps with drafts gave the requests that had some"
        )
        self._acceptance = self._series(
            Gauge, "spec_decode_draft_acceptance_rate", "Share of draft tokens that were kept"
        )
        self._efficiency = self._series(
            Gauge, "spec_decode_efficiency", "Emitted tokens, as a share of those that perfect drafts would have given"
        )

    def _make_request_series(self, context: int) -> None:
        lengths = tuple(one_two_five(context))
        self._prompt_tokens = self._series(Counter, "prompt_tokens", "Prompt tokens of finished requests")
        self._generation_tokens = self._series(Counter, "generation_tokens", "Generated tokens")
        self._tokens = self._series(Counter, "tokens", "Prompt and generated tokens")
        self._ttft = self._series(Histogram, "time_to_first_token_seconds", "Time to first token", buckets=TTFT)
        self._tpot = [
            self._series(Histogram, name, "Time between tokens", buckets=TPOT)
            for name in ("time_per_output_token_seconds", "inter_token_latency_seconds")
        ]
        self._e2e = self._series(Histogram, "e2e_request_latency_seconds", "Arrival to end", buckets=LATENCY)
        self._queue = [
            self._series(Histogram, name, text, buckets=LATENCY)
            for name, text in (
                ("request_queue_time_seconds", "Time in the queue"),
                ("time_in_queue_requests", "Deprecated: the same as request_queue_time_seconds"),
            )
        ]
        self._inference = self._series(Histogram, "request_inference_time_seconds", "Scheduled to end", buckets=LATENCY)
        self._prefill = self._series(
            Histogram, "request_prefill_time_seconds", "Scheduled to first token", buckets=LATENCY
        )
        self._decode = self._series(Histogram, "request_decode_time_seconds", "First token to end", buckets=LATENCY)
        self._prompt_length = self._series(Histogram, "request_prompt_tokens", "Prompt length", buckets=lengths)
        self._length = self._series(Histogram, "request_generation_tokens", "Generated length", buckets=lengths)
        self._longest = self._series(
            Histogram, "request_max_num_generation_tokens", "Generated length of the longest choice", buckets=lengths
        )
        self._cached = self._series(Counter, "prompt_tokens_cached", "Prompt tokens that were in the prefix cache")
        self._request_preemptions = self._series(
            Histogram, "request_num_preemptions", "How often a request was preempted", buckets=PREEMPTIONS
        )
        self._asked = self._series(Histogram, "request_params_max_tokens", "max_tokens asked for", buckets=lengths)
        self._n = self._series(Histogram, "request_params_n", "n asked for", buckets=(1, 2, 5, 10, 20))
        self._success = self._series(Counter, "request_success", "Ended choices by reason", ("finished_reason",))
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(self._model, reason)

    def _make_step_series(self, traced: Set[str]) -> None:
        self._forward = self._execute = None
        if "model" in traced:
            text = "Time in the model's forward passes"
            self._forward = self._series(Histogram, "model_forward_time_milliseconds", text, buckets=STEP_TIMES)
        if "worker" in traced:
            text = "Time in steps: forward passes and sampling"
            self._execute = self._series(Histogram, "model_execute_time_milliseconds", text, buckets=STEP_TIMES)

    def on_step(self, step: StepOutputs) -> None:
        stats, seen = step.stats, self._seen
        self._show_queue(stats)
        self._swap_usage.set(stats.swap_usage)
        for gauge in self._usage:
            gauge.set(stats.kv_usage)
        # The engine counts from its own start: after a restart the totals begin anew.
        self._queries.inc(max(stats.prefix_queries - seen.prefix_queries, 0))
        self._hits.inc(max(stats.prefix_hits - seen.prefix_hits, 0))
        self._preemptions.inc(max(stats.num_preemptions - seen.num_preemptions, 0))
        if stats.prefix_queries:
            self._hit_rate.set(stats.prefix_hits / stats.prefix_queries)
        if stats.host_queries:
            self._host_hit_rate.set(stats.host_hits / stats.host_queries)
        if stats.num_drafts:
            self._count_drafts(stats, seen)
        for seconds in stats.block_lifetimes:
            self._lifetimes.observe(seconds)
        if stats.num_step_tokens:
            self._step_tokens.observe(stats.num_step_tokens)
        generated = sum(len(output.token_ids) for output in step.outputs if isinstance(output, TokenOutput))
        self._prompt_count += stats.num_prompt_tokens
        self._generated_count += generated
        self._seen = stats

    def _show_queue(self, stats: StepStats) -> None:
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        self.swapped.set(stats.num_swapped)
        is_asleep = stats.sleep_level != AWAKE
        counts = (stats.num_waiting - stats.num_deferred, stats.num_deferred, 0)
        for reason, count in zip(WAITING_REASONS, (0, 0, stats.num_waiting) if is_asleep else counts, strict=True):
            self._waiting_by_reason[reason].set(count)
        if stats.sleep_level != self._seen.sleep_level:
            self._sleep_states[self._seen.sleep_level].set(0)
            self._sleep_states[stats.sleep_level].set(1)

    def _count_drafts(self, stats: StepStats, seen: StepStats) -> None:
        self._drafts.inc(max(stats.num_drafts - seen.num_drafts, 0))
        self._accepted.inc(max(stats.num_accepted - seen.num_accepted, 0))
        self._emitted.inc(max(stats.num_emitted - seen.num_emitted, 0))
        self._acceptance.set(stats.num_accepted / stats.num_drafts)
        num_perfect = stats.num_drafts + stats.num_emitted - stats.num_accepted
        self._efficiency.set(stats.num_emitted / num_perfect)

    def take_finished(self, finished: FinishedRequest) -> None:
        for reason in finished.reasons:
            self._success.labels(self._model, reason).inc()
        self._prompt_tokens.inc(finished.num_prompt)
        self._generation_tokens.inc(finished.num_generated)
        self._tokens.inc(finished.num_prompt + finished.num_generated)
        self._prompt_length.observe(finished.num_prompt)
        self._length.observe(finished.num_generated)
        self._longest.observe(max(finished.lengths.values(), default=0))
        self._cached.inc(finished.num_cached)
        self._request_preemptions.observe(finished.num_preemptions)
        self._asked.observe(finished.max_tokens)
        self._n.observe(finished.n)
        now = time.time()
        self._e2e.observe(now - finished.arrival)
        for histogram, seconds in ((self._forward, finished.times.forward), (self._execute, finished.times.execute)):
            if histogram is not None and seconds is not None:
                histogram.observe(1000 * seconds)
        if finished.queue_seconds is None:
            return  # it never left the queue
        scheduled = finished.arrival + finished.queue_seconds
        for histogram in self._queue:
            histogram.observe(finished.queue_seconds)
        self._inference.observe(max(now - scheduled, 0))
        if finished.first_token is not None:
            self._ttft.observe(finished.first_token - finished.arrival)
            self._prefill.observe(max(finished.first_token - scheduled, 0))
            self._decode.observe(now - finished.first_token)

    def take_gap(self, seconds: float, num_tokens: int) -> None:
        """Time since the last output of a choice, whose next `num_tokens` tokens came at once."""
        for histogram in self._tpot:
            for _ in range(num_tokens):
                histogram.observe(seconds / num_tokens)

    def log_line(self) -> None:
        """Throughput since the last line; silent while nothing happens."""
        now = time.monotonic()
        seconds, self._logged = max(now - self._logged, 1e-9), now
        prompt, generated = self._prompt_count - self._prompt_seen, self._generated_count - self._generated_seen
        self._prompt_seen, self._generated_seen = self._prompt_count, self._generated_count
        stats = self._seen
        if not (prompt or generated or stats.num_running or stats.num_waiting or stats.num_swapped):
            return
        LOG.info(
            "prompt %.1f tokens/s, generation %.1f tokens/s, running %d, waiting %d, swapped %d, "
            "KV usage %.1f %%, prefix hits %.1f %%",
            prompt / seconds, generated / seconds, stats.num_running, stats.num_waiting, stats.num_swapped,
            100 * stats.kv_usage, 100 * stats.prefix_hits / max(stats.prefix_queries, 1),
        )  # fmt: skip


class FinishedRequest:
    """Counts and times of one engine request, kept for the metrics while it runs."""

    def __init__(self, num_prompt: int, n: int, max_tokens: int, arrival: float) -> None:
        self.num_prompt, self.n, self.max_tokens, self.arrival = num_prompt, n, max_tokens, arrival
        self.lengths: dict[int, int] = {}
        """Generated tokens of each choice."""
        self.num_cached = 0
        self.num_preemptions = 0
        self.queue_seconds: float | None = None
        self.first_token: float | None = None
        self.times = StepTimes()
        """Seconds in steps, where they are measured."""
        self.last: dict[int, float] = {}
        self.reasons: list[str] = []

    def take_times(self, times: StepTimes) -> None:
        """Those of a choice that has ended: the choices of a request run beside each other."""
        if times.forward is not None:
            self.times = StepTimes(max(times.forward, self.times.forward or 0.0), self.times.execute)
        if times.execute is not None:
            self.times = StepTimes(self.times.forward, max(times.execute, self.times.execute or 0.0))

    @property
    def num_generated(self) -> int:
        return sum(self.lengths.values())
