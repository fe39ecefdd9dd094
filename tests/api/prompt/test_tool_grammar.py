"""Schemas that tools make of an answer."""

from __future__ import annotations

from typing import Any

from fuseline.api.prompt.tool_grammar import answer_schema
from fuseline.api.prompt.tools import Tool, ToolUse

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "$defs": {"city": {"type": "string"}}}


def call(name: str, parameters: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": [name]}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def test_a_named_function_leaves_its_arguments() -> None:
    assert answer_schema(ToolUse("named", (Tool("f", CITY),))) == CITY
    assert answer_schema(ToolUse("named", (Tool("f", None),))) == {"type": "object"}
    bare = {"properties": {"a": {}}}
    assert answer_schema(ToolUse("named", (Tool("f", bare),))) == {"type": "object", **bare}


def test_required_leaves_a_list_of_calls() -> None:
    inner = {"type": "object", "properties": {"city": {"$ref": "#/$defs/tool0.city"}}}
    one = answer_schema(ToolUse("required", (Tool("f", CITY),)))
    definitions = {"tool0.city": {"type": "string"}}
    assert one == {"type": "array", "minItems": 1, "items": call("f", inner), "$defs": definitions}
    two = answer_schema(ToolUse("required", (Tool("f", CITY), Tool("g", None)), is_parallel=False))
    assert two["maxItems"] == 1 and two["items"] == {"anyOf": [call("f", inner), call("g", {"type": "object"})]}


def test_definitions_of_two_tools_keep_apart() -> None:
    """One name may mean another thing in each tool."""
    other = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "$defs": {"city": {"type": "integer"}}}
    schema = answer_schema(ToolUse("required", (Tool("f", CITY), Tool("g", other))))
    found = []
    for item, tool in zip(schema["items"]["anyOf"], (CITY, other), strict=True):
        ref = item["properties"]["parameters"]["properties"]["city"]["$ref"]
        found.append(schema["$defs"][ref.removeprefix("#/$defs/")] == tool["$defs"]["city"])
    assert found == [True, True]


def test_a_schema_that_refers_to_itself_still_does() -> None:
    tree = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}, "$ref": {"const": "#"}}}
    tree["properties"]["default"] = {"$ref": "#"}
    schema = answer_schema(ToolUse("required", (Tool("f", tree),)))
    moved = schema["items"]["properties"]["parameters"]
    assert moved["properties"]["kids"]["items"] == {"$ref": "#/$defs/tool0"} and schema["$defs"]["tool0"] == moved
    assert moved["properties"]["default"] == {"$ref": "#/$defs/tool0"}
    assert moved["properties"]["$ref"] == {"const": "#"}


def test_nothing_is_asked_of_other_choices() -> None:
    assert answer_schema(ToolUse("auto", (Tool("f", CITY),))) is answer_schema(ToolUse()) is None
