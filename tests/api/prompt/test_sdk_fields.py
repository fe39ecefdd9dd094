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


FOREIGN = {
    "responses": ("response_format", "max_completion_tokens", "messages", "reasoning_effort", "tool_choice.function"),
    "messages": ("response_format", "max_completion_tokens", "reasoning_effort", ".function"),
    "count_tokens": ("response_format", "max_completion_tokens", "reasoning_effort", ".function"),
}
"""Names of the chat request, as which these are prepared."""
DEEP: dict[str, object] = {}
for _ in range(400):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
LOOKING = {"type": "string", "pattern": "(?=a)"}
ODD = [LOOKING, {"type": "zzz"}, {"$ref": "#/nowhere"}, {"not": {"type": "string"}}, DEEP]
"""Schemas that cannot be enforced."""
LATE: list[tuple[str, str, dict[str, Any]]] = [
    *(("responses", "text", {"text": {"format": {"type": "json_schema", "name": "x", "schema": odd}}}) for odd in ODD),
    *(("messages", "output_config", {"output_config": {"format": {"type": "json_schema", "schema": odd}}})
      for odd in ODD),
    *(("chat", "response_format", {"response_format": {"type": "json_schema", "json_schema": {"schema": odd}}})
      for odd in ODD),
    *(("completion", "guided_json", {"guided_json": odd}) for odd in ODD),
    ("responses", "max_output_tokens", {"max_output_tokens": 10**6}), ("messages", "max_tokens", {"max_tokens": 10**6}),
    ("responses", "input", {"input": "x" * 20000}), ("responses", "input", {"input": []}),
    ("messages", "stop_sequences", {"stop_sequences": [""]}),
    ("messages", "stop_sequences", {"stop_sequences": ["x"] * 99}),
    ("messages", "tool_choice", {"tools": BLOCK_TOOLS, "tool_choice": {"type": "tool", "name": "y"}}),
    ("messages", "tool_choice", {"tool_choice": {"type": "any"}}),
    ("responses", "tool_choice", {"tools": FLAT_TOOLS, "tool_choice": {"type": "function", "name": "y"}}),
    ("responses", "tool_choice", {"tools": FLAT_TOOLS, "tool_choice": {"type": "function"}}),
    ("responses", "tool_choice", {"tool_choice": "required"}), ("responses", "tool_choice", {"tool_choice": "zz"}),
    ("responses", "text", {"text": {"verbosity": "low"}}), ("responses", "reasoning", {"reasoning": {"effort": "zz"}}),
    ("responses", "input", {"instructions": "x", "input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
    ("responses", "input", {"input": [{"type": "function_call", "name": "f", "call_id": "c", "arguments": "{"}]}),
    ("messages", "system", {"system": [{"type": "image"}]}),
    ("messages", "thinking", {"thinking": {"type": "enabled"}}),
    ("messages", "thinking", {"thinking": {"type": "enabled", "budget_tokens": 0}}),
    ("messages", "tools", {"tools": [{"name": "x"}]}),
    ("messages", "messages", {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a"}]}]}),
]  # fmt: skip
"""Found late: (route, field, fields)."""


@pytest.fixture(scope="module")
def own() -> Preparer:
    flags = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    return preparer(strict_requests=True, **flags)


def answer(own: Preparer, kind: str, name: str, value: Any) -> Refused | None:
    reply = own.prepare(kind, body(**{**ROUTES[kind][2], **BESIDE.get((kind, name), {}), name: value}))
    return reply if isinstance(reply, Refused) else None


def names_it(kind: str, name: str, reply: Refused) -> bool:
    """Whether the client learns which field it is, from `param` or, where there is none, from the message; and reads
    of no field of another route.
    """
    error = ApiError(reply.status, reply.message, reply.param, reply.code)
    if kind in ("messages", "count_tokens"):
        message = error_body(error)["error"]["message"]
        return name in message and not any(other in message for other in FOREIGN[kind])
    message = error.body()["error"]["message"]
    is_named = (reply.param or "").split(".")[0].split("[")[0] == name
    return is_named and not any(other in message for other in FOREIGN.get(kind, ()))


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


@pytest.mark.parametrize(("kind", "name", "fields"), LATE, ids=lambda part: str(part)[:60])
def test_what_is_found_late_is_told_in_the_routes_own_words(
    own: Preparer, kind: str, name: str, fields: dict[str, Any]
) -> None:  # fmt: skip
    reply = own.prepare(kind, body(**{**ROUTES[kind][2], **fields}))
    assert isinstance(reply, Refused) and reply.status == 400 and names_it(kind, name, reply), reply


def test_thoughts_that_are_to_be_omitted_are(own: Preparer) -> None:
    fields = ROUTES["messages"][2] | {"thinking": {"type": "adaptive", "display": "omitted"}}
    assert not own.prepare("messages", body(**fields)).answer.parse.shows_reasoning


def test_a_template_without_end_is_told_as_that() -> None:
    made = preparer(chat_template="{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}")
    for kind in ("chat", "messages", "responses"):
        reply = made.prepare(kind, body(**ROUTES[kind][2]))
        assert isinstance(reply, Refused) and "template recurses" in reply.message and "body" not in reply.message
