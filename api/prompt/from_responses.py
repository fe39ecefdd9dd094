"""A body of /v1/responses as the chat request that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuseline.api.errors import bad_request
from fuseline.api.prompt.chat import read_arguments
from fuseline.api.prompt.field_checks import check_callers, refuse_fields
from fuseline.api.prompt.media import unsupported_kind
from fuseline.api.prompt.parse import validate, validate_part
from fuseline.api.protocol.chat import ChatRequest
from fuseline.api.protocol.responses import (
    CallItem,
    CallOutputItem,
    FunctionTool,
    MessageItem,
    Reasoning,
    ReasoningItem,
    ResponsesRequest,
    TextConfig,
    TextFormat,
    TextPart,
)

SAME = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "parallel_tool_calls",
    "stream",
    "user",
    "chat_template_kwargs",
)
LOGPROBS = "message.output_text.logprobs"
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
"""Values of `include` that have something to show here, or ask for nothing."""
REFUSED = {
    "background": "send the request and read its stream",
    "conversation": "send previous_response_id, or the items before as `input`",
    "prompt": "this server stores no prompts; send `instructions` and `input`",
    "context_management": "this server edits no history; send the items that the model should see",
    "moderation": "this server moderates no texts",
}
"""Known fields with nothing here that could heed them -> why. Empty ones ask for nothing and pass."""
ONLY = {
    "summary": ("auto",), "generate_summary": ("auto",), "mode": ("standard",), "context": ("auto", "all_turns"),
}  # fmt: skip
"""Fields of `reasoning` of which the server knows some values: the whole reasoning is shown, and that of all items."""
TOOL_REFUSED = {
    "defer_loading": "the model sees all tools",
    "output_schema": "write it into the tool's description",
}
RENAMED = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "verbosity": "text.verbosity",
    "reasoning_effort": "reasoning.effort",
    "tool_choice.function.name": "tool_choice.name",
    "tool_choice.function": "tool_choice",
}
"""Field of the chat request -> the field that the client has sent."""
TEXTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")


def chat_of_responses(body: ResponsesRequest) -> ChatRequest:
    """Raises ApiError 400."""
    _refuse(body)
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    text, reasoning = body.text or TextConfig(), body.reasoning or Reasoning()
    fields: dict[str, Any] = {
        **{name: getattr(body, name) for name in SAME},
        "messages": messages + _messages(body.input),
        "max_completion_tokens": body.max_output_tokens,
        "tools": [_tool(tool, f"tools[{k}]") for k, tool in enumerate(body.tools or ())] or None,
        "tool_choice": _choice(body.tool_choice, bool(body.tools)),
        "response_format": _format(text.format),
        "reasoning_effort": reasoning.effort,
        "truncate_prompt_tokens": -1 if body.truncation == "auto" else None,
        "logprobs": True if LOGPROBS in (body.include or ()) or body.top_logprobs else None,
        "top_logprobs": body.top_logprobs,
        "verbosity": text.verbosity,
    }
    return validate({name: value for name, value in fields.items() if value is not None}, ChatRequest)


def _refuse(body: ResponsesRequest) -> None:
    refuse_fields(body, REFUSED)
    for name in body.include or ():
        if name not in INCLUDED:
            raise bad_request(f"include: {name[:100]!r} is not supported", "include", "unsupported_value")
    for name, known in ONLY.items():
        value = getattr(body.reasoning, name, None)
        if value is not None and value not in known:
            words = f"reasoning.{name}: this server knows only {' and '.join(map(repr, known))}"
            raise bad_request(words, f"reasoning.{name}", "unsupported_value")


def _messages(items: str | list[Any]) -> list[dict[str, Any]]:
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    thought = ""
    for k, item in enumerate(items):
        where = f"input[{k}]"
        if not isinstance(item, dict):
            raise bad_request(f"{where} must be an object", where)
        kind = item.get("type") or "message"
        if kind == "reasoning":
            thought += _thought(item, where)
        elif kind == "function_call":
            _add_call(messages, item, where, thought)
            thought = ""
        elif kind == "function_call_output":
            messages.append(_output(item, where))
        elif kind == "message":
            messages.append(_message(item, where, thought))
            thought = ""
        else:
            raise bad_request(f"{where}.type: items of type {str(kind)[:50]!r} are not supported", f"{where}.type")
    return messages


def _message(item: Mapping[str, Any], where: str, thought: str) -> dict[str, Any]:
    given = validate_part(item, MessageItem, where)
    content = given.content if isinstance(given.content, str) else _parts(given.content, f"{where}.content")
    message = {"role": given.role, "content": content}
    return {**message, "reasoning_content": thought} if thought and given.role == "assistant" else message


def _parts(parts: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": _text(part, f"{where}[{k}]")} for k, part in enumerate(parts)]


def _text(part: Mapping[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind not in TEXTS:
        raise bad_request(f"{where}: {unsupported_kind(kind)}", where, "unsupported_value")
    return validate_part({"text": part.get("refusal"), **part} if kind == "refusal" else part, TextPart, where).text


def _thought(item: Mapping[str, Any], where: str) -> str:
    given = validate_part(item, ReasoningItem, where)
    if given.encrypted_content and not (given.content or given.summary):
        name = f"{where}.encrypted_content"
        words = f"{name}: this server cannot read it; send the reasoning as content, or leave the item out"
        raise bad_request(words, name, "unsupported_value")
    name = "content" if given.content else "summary"
    return "".join(part["text"] for part in _parts(getattr(given, name) or [], f"{where}.{name}"))


def _output(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = validate_part(item, CallOutputItem, where)
    text = given.output
    if not isinstance(text, str):
        text = "".join(part["text"] for part in _parts(text, f"{where}.output"))
    return {"role": "tool", "tool_call_id": given.call_id, "content": text}


def _add_call(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str, thought: str) -> None:
    """Calls in a row belong to one message, and so does the text in front of them."""
    given = validate_part(item, CallItem, where)
    refuse_fields(given, {"namespace": "this server has no sets of tools"}, where)
    function = {"name": given.name, "arguments": read_arguments(given.arguments, f"{where}.arguments")}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    if thought:
        messages[-1]["reasoning_content"] = thought
    call = {"id": given.call_id, "type": "function", "function": function}
    messages[-1].setdefault("tool_calls", []).append(call)


def _tool(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    if given.get("type") != "function":
        words = f'{where}.type: only tools of type "function" are supported'
        raise bad_request(words, f"{where}.type", "unsupported_value")
    tool = validate_part(given, FunctionTool, where)
    refuse_fields(tool, TOOL_REFUSED, where)
    check_callers(tool, where)
    function = {name: getattr(tool, name) for name in ("name", "description", "parameters", "strict")}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _choice(choice: str | dict[str, Any] | None, has_tools: bool) -> str | dict[str, Any] | None:
    """Without tools, `auto` and `none` ask for nothing."""
    if not has_tools and choice in ("auto", "none"):
        return None
    if not isinstance(choice, dict) or "function" in choice:
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(given: TextFormat | None) -> dict[str, Any] | None:
    if given is None:
        return None
    if given.type != "json_schema":
        return {"type": given.type}
    inner = {"name": given.name, "schema": given.json_schema, "strict": given.strict}
    kept = {name: value for name, value in inner.items() if value is not None}
    return {"type": "json_schema", "json_schema": kept}


def shown_fields(body: ResponsesRequest) -> dict[str, Any]:
    """Fields of the request that the response repeats."""
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": body.reasoning and body.reasoning.model_dump(exclude_unset=True),
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": body.text.model_dump(exclude_unset=True, by_alias=True) if body.text else {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": body.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }
