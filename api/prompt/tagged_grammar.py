"""The grammar of a call whose arguments stand one by one between tags: strings as they are, all else as JSON."""

from __future__ import annotations

from typing import Any

from fuseline.api.errors import ApiError, bad_request
from fuseline.api.parsers.shapes import Tagged
from fuseline.api.parsers.values import types_of
from fuseline.api.prompt.tools import Tool, arguments_schema
from fuseline.api.structured.ebnf import Rules, choice, literal, repeat, sequence, text_until
from fuseline.api.structured.keywords import ANNOTATIONS, check_kinds
from fuseline.api.structured.notation import BLANK, json_within, lines_before
from fuseline.api.structured.schema import SchemaGrammar

OF_OBJECT = ANNOTATIONS | {"type", "properties", "required", "additionalProperties"}
"""Keywords of the arguments' schema that tags can follow: what is additional is left out."""


def tagged_call(rules: Rules, shape: Tagged, tool: Tool) -> str:
    """What follows the mark of a call of `tool`. Raises ApiError 400 that names `tools`."""
    name_end = choice([literal(end) for end in shape.name_ends if end not in (shape.key_opens, shape.closes)])
    head = sequence(literal(tool.name), f"({name_end})?" if shape.key_opens in shape.name_ends else name_end)
    if not tool.is_strict:
        return sequence(head, rules.add(text_until(rules, shape.closes), "free"))
    properties, required = _properties(tool, arguments_schema(tool))
    parts = []
    for name in properties:
        if shape.key_ends in name or name != name.strip():
            raise _refuse(tool, f"the format of this model cannot write the name {name[:50]!r}")
        part = sequence(BLANK, literal(f"{shape.key_opens}{name}{shape.key_ends}"), _value(rules, shape, tool, name))
        parts.append(part if name in required else repeat(part, 0, 1))
    return sequence(head, *parts, BLANK, literal(shape.closes))


def _properties(tool: Tool, schema: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The properties that a call may have, and those that it must have."""
    check_kinds(schema, lambda keyword, reason: _refuse(tool, f"{keyword}: {reason}"), set())
    other = next((key for key in schema if key not in OF_OBJECT and not key.startswith("x-")), None)
    if other or schema.get("type") != "object":
        raise _refuse(tool, f"the format of this model takes an object with properties, and no {other or 'other type'}")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if any(name not in properties for name in required):
        raise _refuse(tool, "the format of this model needs the properties of the arguments")
    return properties, required


def _value(rules: Rules, shape: Tagged, tool: Tool, name: str) -> str:
    opens = sequence(BLANK, literal(shape.value_opens)) if shape.value_opens else ""
    schema = arguments_schema(tool)
    value, types = schema["properties"][name], types_of(schema, name)
    if isinstance(value, dict):
        value = {**{key: schema[key] for key in ("$defs", "definitions") if key in schema}, **value}
    if types == {"string"}:
        made = SchemaGrammar(value, rules, "tools", notation=lines_before(shape.value_ends))
        return sequence(opens, made.expression())
    if "string" in types:
        raise _refuse(tool, f"{name}: the format of this model takes a string, or another type, there")
    made = SchemaGrammar(value, rules, "tools", notation=json_within(shape.value_ends))
    return sequence(opens, BLANK, made.expression(), BLANK, literal(shape.value_ends))


def _refuse(tool: Tool, reason: str) -> ApiError:
    return bad_request(f"tools: {tool.name}: strict is not possible: {reason}", "tools", "unsupported_value")
