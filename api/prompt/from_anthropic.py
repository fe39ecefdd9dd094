"""A body of /v1/messages as the chat request that it stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fuseline.api.errors import bad_request
from fuseline.api.prompt.field_checks import refuse_fields
from fuseline.api.prompt.parse import validate
from fuseline.api.protocol.anthropic import AnthropicMessage, CountTokensRequest, MessagesRequest
from fuseline.api.protocol.chat import ChatRequest

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
REFUSED = {
    "container": "this server runs no code",
    "mcp_servers": "this server calls no tools itself; send them as `tools`",
    "context_management": "this server edits no history; send the messages that the model should see",
}
"""Known fields with nothing here that could heed them -> why. Empty ones ask for nothing and pass."""
RENAMED = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
}
"""Field of the chat request -> the field that the client has sent."""


def chat_of_messages(body: CountTokensRequest, has_reasoning: bool = False) -> ChatRequest:
    """`has_reasoning`: the server knows which text is reasoning, and can bound it. Raises ApiError 400."""
    refuse_fields(body, REFUSED)
    messages = [{"role": "system", "content": _system(body.system)}] if body.system else []
    for k, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{k}]")
    choice, output = body.tool_choice or {}, body.output_config or {}
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "tools": [_tool(tool, f"tools[{k}]") for k, tool in enumerate(body.tools)] if body.tools else None,
        "tool_choice": _choice(choice) if choice and body.tools else None,
        "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
        "chat_template_kwargs": _thinking(body.thinking),
        "thinking_token_budget": _budget(body.thinking) if has_reasoning else None,
        "continue_final_message": True if _is_begun(messages) else None,
        "response_format": _format(output.get("format")),
        "reasoning_effort": output.get("effort"),
    }
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_completion_tokens": body.max_tokens, "stop": body.stop_sequences or None, "stream": body.stream,
            "temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k,
        }  # fmt: skip
    return validate({name: value for name, value in fields.items() if value is not None}, ChatRequest)


def _system(system: str | list[dict[str, Any]]) -> str:
    return system if isinstance(system, str) else "\n".join(str(part.get("text") or "") for part in system)


def _messages(message: AnthropicMessage, where: str) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, in front of what the user adds."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    found: list[dict[str, Any]] = []
    own: dict[str, Any] = {"role": message.role, "content": []}
    for k, block in enumerate(message.content):
        kind, inner = block.get("type"), f"{where}.content[{k}]"
        if kind == "tool_result":
            content = _result(block, inner)
            found.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content})
        elif kind == "tool_use":
            own.setdefault("tool_calls", []).append(_call(block, inner))
        elif kind == "thinking":
            own["reasoning_content"] = own.get("reasoning_content", "") + str(block.get("thinking") or "")
        elif kind != "redacted_thinking":
            own["content"].append({"type": "text", "text": str(block.get("text") or "")} if kind == "text" else block)
    if len(own) > 2 or own["content"] or not found:
        content = own["content"]
        is_text = all(part.get("type") == "text" for part in content)
        found.append({**own, "content": "\n".join(part["text"] for part in content) if is_text else content})
    return found


def _is_begun(messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is the begin of the answer, which goes on behind it."""
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant" and bool(last["content"]) and not last.get("tool_calls")


def _format(given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("type") != "json_schema" or not isinstance(given.get("schema"), dict):
        where = "output_config.format"
        raise bad_request(f'{where} must be {{"type": "json_schema", "schema": SCHEMA}}', where, "unsupported_value")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": given["schema"], "strict": True}}


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(block.get("name"), str) or not isinstance(block.get("input"), dict):
        raise bad_request(f"{where} needs a name and an input, which is an object", where)
    arguments = json.dumps(block["input"], ensure_ascii=False)
    return {"id": block.get("id"), "type": "function", "function": {"name": block["name"], "arguments": arguments}}


def _result(block: Mapping[str, Any], where: str) -> str:
    content = block.get("content")
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise bad_request(f"{where}: this model takes text only", where, "unsupported_value")
        return "\n".join(str(part.get("text") or "") for part in content)
    return str(content or "")


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type", "custom") != "custom":
        raise bad_request(
            f"{where}: only tools of the client's own are supported", f"{where}.type", "unsupported_value"
        )
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
        "strict": tool.get("strict"),
    }
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _choice(choice: Mapping[str, Any]) -> str | dict[str, Any]:
    if choice.get("type") == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") not in CHOICES:
        raise bad_request('tool_choice.type must be "auto", "any", "tool" or "none"', "tool_choice.type")
    return CHOICES[choice["type"]]


def _thinking(thinking: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A variable of the templates that know it."""
    if thinking is None:
        return None
    if thinking.get("type") not in ("enabled", "disabled", "adaptive"):
        raise bad_request('thinking.type must be "enabled", "adaptive" or "disabled"', "thinking.type")
    return {"enable_thinking": thinking["type"] != "disabled"}


def _budget(thinking: Mapping[str, Any] | None) -> int | None:
    budget = (thinking or {}).get("budget_tokens")
    if budget is None or thinking.get("type") != "enabled":
        return None
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise bad_request("thinking.budget_tokens must be a number of tokens, 1 or more", "thinking.budget_tokens")
    return budget
