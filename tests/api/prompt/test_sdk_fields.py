"""Every field of the clients' own types, with values of its type and with wrong ones: it works or is a 400 by name."""

from __future__ import annotations

from typing import Any

import pytest
import sdk_values
from anthropic.types import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming as MessageParams
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as CompletionParams
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming as ResponseParams
from prompt_cases import body, preparer

from fuseline.api.errors import ApiError
from fuseline.api.output.anthropic_messages import error_body
from fuseline.api.prompt.prepare import Preparer
from fuseline.api.prompt.prepared import Refused
from fuseline.api.protocol.anthropic import CountTokensRequest, MessagesRequest
from fuseline.api.protocol.chat import ChatRequest
from fuseline.api.protocol.completion import CompletionRequest
from fuseline.api.protocol.responses import ResponsesRequest

ASK = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
BLOCK_TOOLS = [{"name": "x", "input_schema": SCHEMA}]
TOOLS = [{"type": "function", "function": {"name": "x", "parameters": SCHEMA}}]
FLAT_TOOLS = [{"type": "function", "name": "x", "parameters": SCHEMA}]
ROUTES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "messages": (MessageParams, MessagesRequest, {"messages": ASK, "max_tokens": 1100}),
    "count_tokens": (MessageCountTokensParams, CountTokensRequest, {"messages": ASK}),
    "responses": (ResponseParams, ResponsesRequest, {"input": "Hi", "max_output_tokens": 4}),
    "chat": (ChatParams, ChatRequest, {"messages": ASK, "max_tokens": 4}),
    "completion": (CompletionParams, CompletionRequest, {"prompt": "Hi", "max_tokens": 4}),
}
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    **{(kind, "tool_choice"): {"tools": BLOCK_TOOLS} for kind in ("messages", "count_tokens")},
    ("chat", "tool_choice"): {"tools": TOOLS}, ("responses", "tool_choice"): {"tools": FLAT_TOOLS},
    ("chat", "top_logprobs"): {"logprobs": True},
    **{(kind, "stream_options"): {"stream": True} for kind in ("chat", "completion", "responses")},
}  # fmt: skip
"""What a field needs to have any meaning."""
DEPTHS = {
    ("chat", "messages"): 1, ("chat", "prediction"): 2, ("messages", "system"): 2, ("count_tokens", "system"): 2,
}  # fmt: skip
"""Content parts may be texts, and templates take any keys of a message; notes of citations and caches are not read."""
FIELDS = [(kind, name) for kind, (params, _, _) in ROUTES.items() for name in sdk_values.keys(params)[0]]


@pytest.fixture(scope="module")
def own() -> Preparer:
    flags = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    return preparer(strict_requests=True, **flags)


def answer(own: Preparer, kind: str, name: str, value: Any) -> Refused | None:
    reply = own.prepare(kind, body(**{**ROUTES[kind][2], **BESIDE.get((kind, name), {}), name: value}))
    return reply if isinstance(reply, Refused) else None


def names_it(kind: str, name: str, reply: Refused) -> bool:
    """Whether the client learns which field it is: from `param`, or where there is none from the message."""
    if kind not in ("messages", "count_tokens"):
        return (reply.param or "").split(".")[0].split("[")[0] == name
    message = error_body(ApiError(reply.status, reply.message, reply.param, reply.code))["error"]["message"]
    return name in message


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda part: part)
def test_a_field_works_or_is_refused_by_name(own: Preparer, kind: str, name: str) -> None:
    params, known, _ = ROUTES[kind]
    assert name in known.model_fields
    values = list(sdk_values.valid(sdk_values.keys(params)[0][name]))
    assert values
    for value in values:
        reply = answer(own, kind, name, value)
        allowed = (400, 404) if name == "model" else (400,)
        assert reply is None or (reply.status in allowed and names_it(kind, name, reply)), (value, reply)


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda part: part)
def test_a_wrong_type_is_refused_by_name(own: Preparer, kind: str, name: str) -> None:
    hint = sdk_values.keys(ROUTES[kind][0])[0][name]
    values = list(sdk_values.wrong(hint, DEPTHS.get((kind, name), 3)))
    assert values
    for value in values:
        if (kind, name) == ("chat", "reasoning_effort") and isinstance(value, str):
            continue  # templates have levels of their own
        reply = answer(own, kind, name, value)
        allowed = (400, 404) if name == "model" else (400,)
        assert reply is not None and reply.status in allowed and names_it(kind, name, reply), (value, reply)
