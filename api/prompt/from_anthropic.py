"""A body of /v1/messages as the chat request that it stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fuseline.api.errors import bad_request
from fuseline.api.prompt.field_checks import check_callers, refuse_fields
from fuseline.api.prompt.media import MAX_KIND, media_of, unsupported_kind
from fuseline.api.prompt.parse import validate, validate_part
from fuseline.api.protocol.anthropic import (
    AnthropicMessage,
    AnthropicToolChoice,
    ClientTool,
    CountTokensRequest,
    MessagesRequest,
    OutputFormat,
    TextBlock,
    Thinking,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from fuseline.api.protocol.chat import ChatRequest

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
REFUSED = {
    "container": "this server runs no code",
    "diagnostics": "this server compares no requests",
    "mcp_servers": "this server calls no tools itself; send them as `tools`",
    "context_management": "this server edits no history; send the messages that the model should see",
}
"""Known fields with nothing here that could heed them -> why. Empty ones ask for nothing and pass."""
TOOL_REFUSED = {
    "defer_loading": "the model sees all tools",
    "input_examples": "write them into the tool's description",
}
RENAMED = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "tool_choice.function.name": "tool_choice.name",
    "tool_choice.function": "tool_choice",
    "thinking_token_budget": "thinking.budget_tokens",
}
"""Field of the chat request -> the field that the client has sent."""
SPEAKERS = {"tool_use": "assistant", "thinking": "assistant", "tool_result": "user"}
"""Type of a block -> the role whose messages may hold it."""


def chat_of_messages(body: CountTokensRequest) -> ChatRequest:
    """Raises ApiError 400."""
    _refuse(body)
    messages = [{"role": "system", "content": _texts(body.system, "system")}] if body.system else []
    for k, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{k}]")
    choice, output = body.tool_choice, body.output_config
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "tools": [_tool(tool, f"tools[{k}]") for k, tool in enumerate(body.tools)] if body.tools else None,
        "tool_choice": _choice(choice, bool(body.tools)) if choice else None,
        "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
        "chat_template_kwargs": _thinking(body.thinking),
        "include_reasoning": False if body.thinking and body.thinking.display == "omitted" else None,
        "thinking_token_budget": body.thinking.budget_tokens if body.thinking else None,
        "continue_final_message": True if _is_begun(messages) else None,
        "response_format": _format(output.format if output else None),
        "reasoning_effort": output.effort if output else None,
    }
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_completion_tokens": body.max_tokens, "stop": body.stop_sequences or None, "stream": body.stream,
            "temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k,
        }  # fmt: skip
    return validate({name: value for name, value in fields.items() if value is not None}, ChatRequest)


def _refuse(body: CountTokensRequest) -> None:
    refuse_fields(body, REFUSED)
    if body.speed == "fast":
        raise bad_request("speed: this server has one speed; leave it out", "speed", "unsupported_value")
    if body.thinking and body.thinking.type == "between_tools":
        words = 'thinking.type "between_tools" is not supported: use "enabled", "adaptive" or "disabled"'
        raise bad_request(words, "thinking.type", "unsupported_value")


def _texts(content: str | list[dict[str, Any]], where: str) -> str:
    """Text of a field that holds a text or blocks of text."""
    if isinstance(content, str):
        return content
    return "\n".join(_text(block, f"{where}[{k}]") for k, block in enumerate(content))


def _text(block: Mapping[str, Any], where: str) -> str:
    _refuse_type(block, ("text",), where)
    return validate_part(block, TextBlock, where).text


def _refuse_type(block: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    kind = block.get("type")
    if kind not in known:
        is_medium = media_of(kind) is not None
        why = unsupported_kind(kind) if is_medium else f"blocks of type {str(kind)[:MAX_KIND]!r} are not supported here"
        words = f"{where}.type: {why} ({', '.join(known)})"
        raise bad_request(words, f"{where}.type", "unsupported_value")


def _messages(message: AnthropicMessage, where: str) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, in front of what the user adds."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    found: list[dict[str, Any]] = []
    own: dict[str, Any] = {"role": message.role, "content": None}
    texts: list[str] = []
    for k, block in enumerate(message.content):
        kind, inner = block.get("type"), f"{where}.content[{k}]"
        _refuse_type(block, ("text", *(name for name, role in SPEAKERS.items() if role == message.role)), inner)
        if kind == "tool_result":
            found.append(_result(block, inner))
        elif kind == "tool_use":
            own.setdefault("tool_calls", []).append(_call(block, inner))
        elif kind == "thinking":
            thought = validate_part(block, ThinkingBlock, inner).thinking
            own["reasoning_content"] = own.get("reasoning_content", "") + thought
        else:
            texts.append(_text(block, inner))
    if len(own) > 2 or texts or not found:
        found.append({**own, "content": "\n".join(texts)})
    return found


def _is_begun(messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is the begin of the answer, which goes on behind it."""
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant" and bool(last["content"]) and not last.get("tool_calls")


def _format(given: OutputFormat | None) -> dict[str, Any] | None:
    if given is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": given.json_schema, "strict": True}}


def _call(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    block = validate_part(given, ToolUseBlock, where)
    _refuse_others(block.caller, block.toolset_name, where)
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _refuse_others(caller: Mapping[str, Any] | None, toolset: str | None, where: str) -> None:
    """Calls of tools that this server would have to run."""
    if caller and caller.get("type") != "direct":
        words = f'{where}.caller: only calls of the type "direct" are supported'
        raise bad_request(words, f"{where}.caller", "unsupported_value")
    if toolset is not None:
        words = f"{where}.toolset_name: this server has no sets of tools"
        raise bad_request(words, f"{where}.toolset_name", "unsupported_value")


def _result(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    block = validate_part(given, ToolResultBlock, where)
    _refuse_others(None, block.toolset_name, where)
    text = _texts(block.content or "", f"{where}.content")
    if block.is_error and not text.lower().startswith("error"):  # templates know texts only
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}


def _tool(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    if given.get("type") not in (None, "custom"):
        words = f"{where}.type: only tools of the client's own are supported"
        raise bad_request(words, f"{where}.type", "unsupported_value")
    tool = validate_part(given, ClientTool, where)
    refuse_fields(tool, TOOL_REFUSED, where)
    check_callers(tool, where)
    function = {
        "name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict,
    }  # fmt: skip
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _choice(choice: AnthropicToolChoice, has_tools: bool) -> str | dict[str, Any] | None:
    if not has_tools:
        if choice.type in ("any", "tool"):
            raise bad_request(f'tool_choice "{choice.type}" needs tools', "tool_choice")
        return None
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return CHOICES[choice.type]


def _thinking(thinking: Thinking | None) -> dict[str, Any] | None:
    """A variable of the templates that know it."""
    return None if thinking is None else {"enable_thinking": thinking.type != "disabled"}
