"""Counts of one step, for the API's metrics."""

from __future__ import annotations

from fuseline.engine.messages import StepStats
from fuseline.engine.outputs import Report
from fuseline.engine.run.speculate.drafting import Drafting
from fuseline.engine.schedule.scheduler import Scheduler


def make_stats(scheduler: Scheduler, report: Report, drafting: Drafting | None, sleep_level: int) -> StepStats:
    swap = scheduler.kv.swap
    num_swapped = swap.num_sequences if swap else 0
    return StepStats(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting) - num_swapped,
        num_deferred=scheduler.waiting.num_deferred,
        num_swapped=num_swapped,
        num_preemptions=scheduler.num_preemptions,
        kv_usage=scheduler.kv.usage,
        swap_usage=swap.usage if swap else 0.0,
        prefix_queries=scheduler.prefix_queries,
        prefix_hits=scheduler.prefix_hits,
        host_queries=scheduler.host_queries,
        host_hits=scheduler.host_hits,
        num_drafts=drafting.num_drafts if drafting else 0,
        num_accepted=drafting.num_accepted if drafting else 0,
        num_emitted=drafting.num_emitted if drafting else 0,
        block_lifetimes=scheduler.kv.take_lifetimes(),
        sleep_level=sleep_level,
        num_step_tokens=report.num_step_tokens,
        num_prompt_tokens=report.num_prompt_tokens,
    )
