"""Sends a workload at its rate or concurrency and gathers the outcomes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import aiohttp

from fuseline.api.bench.client import Target, ask
from fuseline.api.bench.measure import Outcome
from fuseline.api.bench.workload import Sample


async def warm_up(session: aiohttp.ClientSession, target: Target, samples: Sequence[Sample]) -> str:
    """Send requests that are not counted; returns the first error, or "" when all went well."""
    outcomes = await asyncio.gather(*(ask(session, target, sample) for sample in samples))
    return next((outcome.error for outcome in outcomes if outcome.error), "")


async def run_load(
    session: aiohttp.ClientSession,
    target: Target,
    samples: Sequence[Sample],
    times: Sequence[float],
    max_concurrency: int = 0,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[list[Outcome], float]:
    """Outcomes in the order of `samples`, and the seconds the run took. max_concurrency 0 sets no bound."""
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else None

    async def one(sample: Sample, wait: float) -> Outcome:
        await asyncio.sleep(wait)
        async with AsyncExitStack() as stack:
            if places:
                await stack.enter_async_context(places)
            outcome = await ask(session, target, sample)
        on_done(outcome)
        return outcome

    start = time.perf_counter()
    outcomes = await asyncio.gather(*(one(sample, wait) for sample, wait in zip(samples, times, strict=True)))
    return list(outcomes), time.perf_counter() - start
