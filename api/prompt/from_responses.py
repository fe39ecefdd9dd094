"""A body of /v1/responses as the chat request that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuseline.api.errors import bad_request
from fuseline.api.prompt.field_checks import refuse_fields
from fuseline.api.prompt.parse import validate
from fuseline.api.protocol.chat import ChatRequest
from fuseline.api.protocol.responses import ResponsesRequest

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
}
"""Known fields with nothing here that could heed them -> why. Empty ones ask for nothing and pass."""
RENAMED = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
    "reasoning_effort": "reasoning.effort",
}
"""Field of the chat request -> the field that the client has sent."""


def chat_of_responses(body: ResponsesRequest) -> ChatRequest:
    """Raises ApiError 400."""
    _refuse(body)
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    fields: dict[str, Any] = {
        **{name: getattr(body, name) for name in SAME},
        "messages": messages + _messages(body.input),
        "max_completion_tokens": body.max_output_tokens,
        "tools": None
        if body.tools is None
        else [_tool(tool, f"tools[{k}]") for k, tool in enumerate(body.tools)] or None,
        "tool_choice": _choice(body.tool_choice) if body.tools else None,
        "response_format": _format((body.text or {}).get("format")),
        "reasoning_effort": (body.reasoning or {}).get("effort"),
        "truncate_prompt_tokens": -1 if body.truncation == "auto" else None,
        "logprobs": True if LOGPROBS in (body.include or ()) or body.top_logprobs else None,
        "top_logprobs": body.top_logprobs,
        "verbosity": (body.text or {}).get("verbosity"),
    }
    return validate({name: value for name, value in fields.items() if value is not None}, ChatRequest)


def _refuse(body: ResponsesRequest) -> None:
    refuse_fields(body, REFUSED)
    if body.truncation not in (None, "auto", "disabled"):
        raise bad_request('truncation must be "auto" or "disabled"', "truncation")
    for name in body.include or ():
        if name not in INCLUDED:
            raise bad_request(f"include: {name[:100]!r} is not supported", "include", "unsupported_value")


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
            thought += "".join(_texts(item.get("content") or item.get("summary"), where))
        elif kind == "function_call":
            _add_call(messages, item, where, thought)
            thought = ""
        elif kind == "function_call_output":
            output = item.get("output")
            text = output if isinstance(output, str) else "".join(_texts(output, f"{where}.output"))
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
        elif kind == "message":
            messages.append(_message(item, where, thought))
            thought = ""
        else:
            raise bad_request(f"{where}: items of type {str(kind)[:50]!r} are not supported", f"{where}.type")
    return messages


def _message(item: Mapping[str, Any], where: str, thought: str) -> dict[str, Any]:
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str):
        raise bad_request(f"{where}.role must be text", f"{where}.role")
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{k}]") for k, part in enumerate(content)]
    message = {"role": role, "content": content}
    return {**message, "reasoning_content": thought} if thought and role == "assistant" else message


def _part(part: Any, where: str) -> Any:
    """A content part of a chat message; what is no text is refused there."""
    if isinstance(part, dict) and part.get("type") in ("input_text", "output_text", "text", "refusal"):
        return {"type": "text", "text": str(part.get("text") or part.get("refusal") or "")}
    return part


def _texts(parts: Any, where: str) -> list[str]:
    if parts is None:
        return []
    if not isinstance(parts, list):
        raise bad_request(f"{where} must be text or a list of parts", where)
    return [str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in parts]


def _add_call(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str, thought: str) -> None:
    """Calls in a row belong to one message, and so does the text in front of them."""
    name, arguments = item.get("name"), item.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise bad_request(f"{where} needs a name and arguments, which are text", where)
    call = {"id": item.get("call_id"), "type": "function", "function": {"name": name, "arguments": arguments}}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    if thought:
        messages[-1]["reasoning_content"] = thought
    messages[-1].setdefault("tool_calls", []).append(call)


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise bad_request(f'{where}: only tools of type "function" are supported', f"{where}.type", "unsupported_value")
    kept = {name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": kept}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, dict) and "function" not in choice and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(given: Any) -> dict[str, Any] | None:
    if not isinstance(given, dict):
        return None
    if given.get("type") != "json_schema":
        return {"type": given.get("type", "text")}
    inner = {name: given[name] for name in ("name", "description", "schema", "strict") if given.get(name) is not None}
    return {"type": "json_schema", "json_schema": inner}


def shown_fields(body: ResponsesRequest) -> dict[str, Any]:
    """Fields of the request that the response repeats."""
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": body.reasoning,
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": body.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }
