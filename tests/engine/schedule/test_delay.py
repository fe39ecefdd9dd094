"""--scheduler-delay-factor: prompts are gathered while others run."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from served_fake import served_fake, until

from fuseline.engine.schedule.delay import PromptDelay


def waiting(*arrivals: float) -> list:
    return [SimpleNamespace(request=SimpleNamespace(arrival_time=arrival)) for arrival in arrivals]


def test_prompts_wait_for_a_share_of_the_last_prompts_step() -> None:
    clock = SimpleNamespace(now=100.0)
    delay = PromptDelay(0.5, lambda: clock.now)
    assert delay.is_over(waiting(100.0), has_running=True), "no step has been timed yet"
    delay.started()
    clock.now = 104.0  # that step took 4 s: prompts wait for 2 s
    assert not delay.is_over(waiting(103.0), has_running=True)
    assert delay.is_over(waiting(103.0), has_running=False)
    clock.now = 105.0
    assert delay.is_over(waiting(104.5, 103.0), has_running=True), "the first of them decides"
    delay.started()
    clock.now = 105.5  # the newest step with prompts counts
    assert not delay.is_over(waiting(105.4), has_running=True) and delay.is_over(waiting(105.25), has_running=True)


async def test_prompts_start_together() -> None:
    async def steps_with_prompts(factor: float) -> int:
        """Steps that begin one of five prompts that come one after the other beside a stream."""
        flags = {"scheduler_delay_factor": factor, "max_num_seqs": 8, "max_num_batched_tokens": 64}
        async with served_fake(step_seconds=0.02, **flags) as served:
            tasks = [asyncio.create_task(served.collect([3] * 8, max_tokens=40, min_tokens=40))]
            await until(lambda: served.shapes)
            for _ in range(5):
                await asyncio.sleep(0.02)
                tasks.append(asyncio.create_task(served.collect([5] * 3, max_tokens=2)))
            await asyncio.gather(*tasks)
            return sum(any(count == 3 for count in shape) for shape in served.shapes)

    assert await steps_with_prompts(0.0) > await steps_with_prompts(8.0)
