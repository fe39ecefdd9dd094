"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack

from fastapi import APIRouter
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.errors import bad_request
from fuseline.api.output.events import Prompt
from fuseline.api.output.openai_completion import CompletionWriter, Shape
from fuseline.api.output.response import Answer
from fuseline.api.prompt.sampling import refuse_unsupported
from fuseline.api.protocol.completion import CompletionRequest
from fuseline.api.routes.http import new_id, read_body
from fuseline.api.served import Served
from fuseline.engine.messages import SamplingParams

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    served: Served = request.app.state.served
    body = await read_body(request, CompletionRequest)
    served.check_model(body.model)
    served.check_ready()
    refuse_unsupported(body)
    _check(body)
    with ExitStack() as stack:
        stack.enter_context(served.admission.take(served.admission.check(body, len(_as_list(body.prompt)))))
        return await _answer(request, served, body, stack)


async def _answer(request: Request, served: Served, body: CompletionRequest, stack: ExitStack) -> Response:
    """The prepared answer, which takes over what `stack` holds."""
    id = new_id("cmpl-", request)
    prompts, params = await _prepare(served, body)
    for prompt, one in zip(prompts, params, strict=True):
        served.log_request(id, prompt.ids, one)
    writer = CompletionWriter(_shape(served, body, id), prompts, body.n or 1)
    runs = [(p, served.generation(body, p.ids, one, id)) for p, one in zip(prompts, params, strict=True)]
    keep_alive = served.config.sse_keep_alive_interval if body.stream else None
    return Answer(served.client, runs, writer, stack.pop_all(), keep_alive)


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise bad_request("suffix is not currently supported", "suffix", "unsupported_value")
    if body.stream and body.prompt_logprobs:
        raise bad_request("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens must be at least 1 (0 goes with echo only)", "max_tokens")


async def _prepare(served: Served, body: CompletionRequest) -> tuple[list[Prompt], list[SamplingParams]]:
    n = body.n or 1
    prompts, params = [], []
    for k, text in enumerate(_as_list(body.prompt)):
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
