"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.output.events import Event
from fuseline.api.output.openai_completion import CompletionWriter, Numbered, Prompt
from fuseline.api.routes.http import new_id, prepare, raw_response, stream, until_disconnect
from fuseline.api.served import Served

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    served: Served = request.app.state.served
    served.check_ready()
    prepared = await prepare(request, "completion")
    served.check_ready()
    id = new_id("cmpl-", request)
    prompts = served.prompts(prepared)
    writer = CompletionWriter(served.shape(prepared, id), prompts, prepared.params.n)
    events = merge([(prompt, served.events(prepared, k, id)) for k, prompt in enumerate(prompts)])
    if prepared.answer.stream:
        return await stream(request, writer.chunks(events), served.config.sse_keep_alive_interval)
    return raw_response(await until_disconnect(request, writer.whole(events)))


async def merge(sources: list[tuple[Prompt, AsyncIterator[Event]]]) -> Numbered:
    """Events of all prompts as they come. The first error ends all.

    The prompts start one after the other, and between two of them the event loop does what else there is to do.
    """
    if len(sources) == 1:
        prompt, events = sources[0]
        async with aclosing(events):
            async for event in events:
                yield prompt, event
        return
    queue: asyncio.Queue = asyncio.Queue()
    tasks: list[asyncio.Task] = []

    async def pump(prompt: Prompt, events: AsyncIterator[Event]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    queue.put_nowait((prompt, event))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    async def start_all() -> None:
        for source in sources:
            tasks.append(asyncio.create_task(pump(*source)))
            await asyncio.sleep(0)

    starting = asyncio.create_task(start_all())
    try:
        num_open = len(sources)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        starting.cancel()
        with suppress(asyncio.CancelledError):
            await starting
        open_tasks = [task for task in tasks if not task.done()]
        for task in open_tasks:
            task.cancel()
        await asyncio.gather(*open_tasks, return_exceptions=True)
