"""The JSON schema that a request's tools make of its answer (SPEC 9.1)."""

from __future__ import annotations

from typing import Any

from fuseline.api.prompt.tools import Tool, ToolUse

ANY_OBJECT: dict[str, Any] = {"type": "object"}


def answer_schema(use: ToolUse) -> dict[str, Any] | None:
    """JSON schema of the whole answer: the arguments of the named function, or a list of calls; None asks for none."""
    if use.choice == "named":
        return _arguments(use.tools[0])
    if use.choice != "required":
        return None
    calls = [_call(tool) for tool in use.tools]
    most = {} if use.is_parallel else {"maxItems": 1}
    definitions = _definitions(use.tools)
    schema = {"type": "array", "minItems": 1, **most, "items": calls[0] if len(calls) == 1 else {"anyOf": calls}}
    return {**schema, "$defs": definitions} if definitions else schema


def _call(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": [tool.name]}, "parameters": _inner(_arguments(tool))},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _arguments(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object whatever it says."""
    schema = tool.parameters or ANY_OBJECT
    return schema if "type" in schema or "$ref" in schema or "anyOf" in schema else {**ANY_OBJECT, **schema}


def _inner(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema as part of another one: its definitions stand at the top."""
    return {key: value for key, value in schema.items() if key not in ("$defs", "definitions", "$schema")}


def _definitions(tools: tuple[Tool, ...]) -> dict[str, Any]:
    """The definitions of all tools; references to them stay as they are written."""
    found: dict[str, Any] = {}
    for tool in tools:
        found |= (tool.parameters or {}).get("$defs", {})
    return found
