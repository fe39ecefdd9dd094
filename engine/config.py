"""Configuration of the engine. Frozen; outer includes inner; field names are flag names, field texts are their help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fuseline.compile.config import CompileConfig, GraphConfig


@dataclass(frozen=True)
class CacheConfig:
    block_size: int = 16
    """Tokens per KV block."""
    enable_prefix_caching: bool = True
    """Reuse the KV of shared prefixes, a block at a time."""
    gpu_memory_utilization: float = 0.9
    """Fraction of the device's memory (on CPU: of the free memory) this server may fill with weights, KV and what steps
    need."""
    kv_cache_memory_bytes: int | None = None
    """Exact size of the KV cache in bytes; overrides the fraction."""
    num_gpu_blocks_override: int | None = None
    """Exact number of KV blocks."""
    swap_space: float = 4.0
    """GiB of host memory for swapped sequences; nothing to swap to on CPU: accepted, treated as 0."""
    fits_context: bool = False
    """Shorten the context to what the KV cache can hold of one sequence (--max-model-len auto)."""
    state_snapshot_share: float = 0.25
    """Share of the cache memory for snapshots of recurrent states, by which models with such states find prefixes.
    States that no sequence uses hold some too."""
    preemption_mode: Literal["recompute", "swap"] = "recompute"
    """How a preempted sequence goes on: computed anew, or on a GPU from its KV in swap space while there is room."""


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_batched_tokens: int = 2048
    """Token budget of a step."""
    max_num_seqs: int = 256
    """Sequences in a step."""
    max_num_queued_reqs: int = 0
    """Sequences (prompts x n) that may wait before new requests get 429; 0 means 4 x max-num-seqs."""
    async_scheduling: bool = False
    """Schedule the next step while the last one runs; tokens are the same. A GPU always works so."""
    scheduler_cls: str = ""
    """Import path of a subclass of fuseline.engine.schedule.scheduler.Scheduler; empty takes that itself."""
    scheduling_policy: str = "fcfs"
    """fcfs, or priority (lower value first, ties by arrival). Of the prompts of a request each counts as coming 0.25 s
    after the one before, so that a request of a thousand does not keep others waiting."""
    scheduler_delay_factor: float = 0.0
    """While others run, prompts wait for so many times the seconds of the last step with new prompts: more of them
    start together."""
    enable_chunked_prefill: bool = True
    """Split long prompts over several steps."""
    chunked_prefill_size: int = 0
    """Most prompt tokens of a step beside the streams', which never wait longer than these take. 0 leaves it to
    max-num-batched-tokens; default 128 on a CPU unless that flag is given."""
    max_num_partial_prefills: int = 1
    """Prompts that may be partly computed at the same time."""
    max_long_partial_prefills: int = 1
    """How many of those may be long."""
    long_prefill_token_threshold: int = 0
    """Prompts longer than this are long; 0 means 4 % of the context when several partial prefills are allowed."""


@dataclass(frozen=True)
class GrammarConfig:
    """Bounds of structured output: grammars are compiled in processes of their own."""

    grammar_timeout: float = 10.0
    """Seconds that compiling a request's grammar may take; it is refused then with 400."""
    grammar_memory: int = 2 * 2**30
    """Bytes of memory that compiling a grammar may take; it is refused then with 400."""
    grammar_cache_bytes: int = 256 * 2**20
    """Bytes of compiled grammars that are kept for requests to come; a larger one is refused with 400."""
    grammar_workers: int = 2
    """Grammars that are compiled at the same time; the processes start with the first request that needs them, on a GPU
    one with the server."""


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine process is told; sent to it as is."""

    compile: CompileConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    device: Literal["auto", "cuda", "neuron", "cpu", "openvino", "tpu", "xpu", "hpu"] = "auto"
    """Where to run; auto takes the best present."""
    graphs: GraphConfig = field(default_factory=GraphConfig)
    grammars: GrammarConfig = field(default_factory=GrammarConfig)
    max_logprobs: int = 20
    """Most log-probabilities a request may ask for at a position; -1 allows the whole vocabulary."""
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"] = "raw_logprobs"
    """Kind of log-probabilities to report: before (raw) or after (processed) penalties, masks and temperature."""
    seed: int = 0
    """Seed of dummy weights and of requests without their own."""
    collect_detailed_traces: str = ""
    """Times of a request's steps, for its span and the metrics: model (forward passes), worker (steps as a whole) or
    all, separated by commas. On a GPU each step waits for the last one then. Needs --otlp-traces-endpoint."""
    disable_log_stats: bool = False
    """No periodic statistics in the log and no engine metrics."""

    @property
    def traced(self) -> frozenset[str]:
        """Modules of --collect-detailed-traces: model, worker."""
        asked = {part.strip() for part in self.collect_detailed_traces.split(",")} - {""}
        return frozenset({"model", "worker"} if "all" in asked else asked)
