"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

from fastapi import APIRouter
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.errors import bad_request
from fuseline.api.output.events import Event
from fuseline.api.output.openai_completion import CompletionWriter, Numbered, Prompt, Shape
from fuseline.api.prompt.sampling import refuse_unsupported
from fuseline.api.protocol.completion import CompletionRequest
from fuseline.api.routes.http import json_response, new_id, read_body, stream, until_disconnect
from fuseline.api.served import Served
from fuseline.engine.messages import SamplingParams

router = APIRouter()
MAX_PROMPTS = 1024


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    served: Served = request.app.state.served
    body = await read_body(request, CompletionRequest)
    served.check_model(body.model)
    served.check_ready()
    refuse_unsupported(body)
    _check(body)
    id = new_id("cmpl-", request)
    prompts, params = await _prepare(served, body)
    for prompt, one in zip(prompts, params, strict=True):
        served.log_request(id, prompt.ids, one)
    shape = _shape(served, body, id)
    writer = CompletionWriter(shape, prompts, body.n or 1)
    events = merge([(p, served.events(body, p.ids, one, id)) for p, one in zip(prompts, params, strict=True)])
    if body.stream:
        return await stream(request, writer.chunks(events), served.config.sse_keep_alive_interval)
    return json_response(await until_disconnect(request, writer.whole(events)))


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise bad_request("suffix is not currently supported", "suffix", "unsupported_value")
    if body.stream and body.prompt_logprobs:
        raise bad_request("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens must be at least 1 (0 goes with echo only)", "max_tokens")


async def _prepare(served: Served, body: CompletionRequest) -> tuple[list[Prompt], list[SamplingParams]]:
    n = body.n or 1
    texts = _as_list(body.prompt)
    if len(texts) > MAX_PROMPTS:
        raise bad_request(f"at most {MAX_PROMPTS} prompts in one request", "prompt")
    prompts, params = [], []
    for k, text in enumerate(texts):
        ids = await _encode(served, text, body)
        served.sampling.check_prompt(ids)
        ids = served.sampling.truncate(ids, body.truncate_prompt_tokens)
        one = served.sampling.build(body, ids, body.max_tokens, body.logprobs)
        if body.echo and body.logprobs is not None and one.prompt_logprobs is None:
            one = _with_prompt_logprobs(one, body.logprobs)
        echo = None
        if body.echo:
            echo = text if isinstance(text, str) else served.need_tokenizer().decode(ids, False)
        prompts.append(Prompt(ids, k * n, echo))
        params.append(one)
    return prompts, params


def _with_prompt_logprobs(params: SamplingParams, count: int) -> SamplingParams:
    return replace(params, prompt_logprobs=count)


def _as_list(prompt: str | list) -> list:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise bad_request("Prompt cannot be empty", "prompt")
    return prompt


async def _encode(served: Served, text: str | list[int], body: CompletionRequest) -> list[int]:
    if not isinstance(text, str):
        return text
    return await encode(served, text, body.add_special_tokens is not False)


async def encode(served: Served, text: str, add_special_tokens: bool) -> list[int]:
    """Long texts are encoded off the event loop."""
    tokenizer = served.need_tokenizer()
    if len(text) < 8192:
        return tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)


def _shape(served: Served, body: CompletionRequest, id: str) -> Shape:
    options = body.stream_options
    usage = bool(options and options.include_usage) or served.config.enable_force_include_usage
    return Shape(
        id=id, created=int(time.time()), model=served.name, writer=served.logprob_writer(body),
        wants_logprobs=body.logprobs is not None, num_top=body.logprobs or 0, wants_ids=bool(body.return_token_ids),
        include_usage=usage, continuous_usage=bool(options and options.continuous_usage_stats),
        shows_cached=served.config.enable_prompt_tokens_details,
    )  # fmt: skip


async def merge(sources: list[tuple[Prompt, AsyncIterator[Event]]]) -> Numbered:
    """Events of all prompts as they come. The first error ends all."""
    if len(sources) == 1:
        prompt, events = sources[0]
        async with aclosing(events):
            async for event in events:
                yield prompt, event
        return
    queue: asyncio.Queue = asyncio.Queue()

    async def pump(prompt: Prompt, events: AsyncIterator[Event]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    queue.put_nowait((prompt, event))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(*source)) for source in sources]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
