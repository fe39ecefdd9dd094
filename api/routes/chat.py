"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from contextlib import ExitStack

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.errors import bad_request
from fuseline.api.output.events import Prompt
from fuseline.api.output.openai_chat import ChatWriter
from fuseline.api.output.openai_completion import Shape
from fuseline.api.output.response import Answer
from fuseline.api.prompt.features import render_chat
from fuseline.api.prompt.sampling import refuse_unsupported
from fuseline.api.protocol.chat import ChatRequest
from fuseline.api.routes.completions import encode
from fuseline.api.routes.http import new_id, read_body
from fuseline.api.served import Served

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    served: Served = request.app.state.served
    body = await read_body(request, ChatRequest)
    served.check_model(body.model)
    served.check_ready()
    refuse_unsupported(body)
    _check(body)
    with ExitStack() as stack:
        stack.enter_context(served.admission.take(served.admission.check(body)))
        return await _answer(request, served, body, stack)


async def _answer(request: Request, served: Served, body: ChatRequest, stack: ExitStack) -> Response:
    """The prepared answer, which takes over what `stack` holds."""
    if body.reasoning_effort is not None:  # a variable of the templates that know it
        body.chat_template_kwargs = {"reasoning_effort": body.reasoning_effort, **(body.chat_template_kwargs or {})}
    text = render_chat(body, served.config, served.template, served.need_tokenizer())
    ids = await encode(served, text, bool(body.add_special_tokens))
    served.sampling.check_prompt(ids, "messages")
    ids = served.sampling.truncate(ids, body.truncate_prompt_tokens)
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = served.sampling.build(body, ids, limit, logprobs)
    id = new_id("chatcmpl-", request, body.request_id)
    served.log_request(id, text, params)
    prompt = Prompt(ids)
    writer = ChatWriter(_shape(served, body, id), prompt, params.n)
    runs = [(prompt, served.generation(body, ids, params, id))]
    keep_alive = served.config.sse_keep_alive_interval if body.stream else None
    return Answer(served.client, runs, writer, stack.pop_all(), keep_alive)


def _check(body: ChatRequest) -> None:
    if body.top_logprobs and not body.logprobs:
        raise bad_request("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    if body.stream and body.prompt_logprobs:
        raise bad_request("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    if body.tools is not None and not body.tools:
        raise bad_request("tools must not be an empty list", "tools")
    if body.tool_choice not in (None, "none") and not body.tools:
        raise bad_request("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if body.tools and body.tool_choice != "none":
        raise bad_request('tools are not supported yet (tool_choice "none" is)', "tools", "unsupported_value")


def _shape(served: Served, body: ChatRequest, id: str) -> Shape:
    options = body.stream_options
    last = body.messages[-1]
    role = served.config.response_role
    if body.add_generation_prompt is False or body.continue_final_message:
        role = last.role
    echo = last.content if body.echo and last.role == role and isinstance(last.content, str) else ""
    return Shape(
        id=id, created=int(time.time()), model=served.name, writer=served.logprob_writer(body),
        wants_logprobs=bool(body.logprobs), num_top=body.top_logprobs or 0, wants_ids=bool(body.return_token_ids),
        include_usage=bool(options and options.include_usage) or served.config.enable_force_include_usage,
        continuous_usage=bool(options and options.continuous_usage_stats),
        shows_cached=served.config.enable_prompt_tokens_details, role=role, echo=echo,
    )  # fmt: skip
