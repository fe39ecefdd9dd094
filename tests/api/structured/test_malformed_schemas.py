"""Schemas whose keywords have values of the wrong kind are 400 with a keyword's name, wherever they stand."""

from __future__ import annotations

import pytest

from fuseline.api.errors import ApiError
from fuseline.api.parsers.formats import tool_formats
from fuseline.api.prompt.call_grammar import call_grammar
from fuseline.api.prompt.grammar import json_spec, request_spec
from fuseline.api.prompt.tools import Tool
from fuseline.api.protocol.chat import ChatRequest
from fuseline.api.structured.keywords import ENFORCED

WRONG = (5, -1, 1.5, True, None, "x", [], [5], [[]], [{}], {}, {"a": 5}, {"a": []}, [None], {"type": 5}, 10**400)
PLACES = {
    "root": lambda schema: schema,
    "allOf": lambda schema: {"allOf": [schema, {"type": "object", "properties": {"a": {}}, "required": ["a"]}]},
    "beside allOf": lambda schema: {**schema, "allOf": [{"minimum": 1, "type": "integer", "enum": [1, 2]}]},
    "twice": lambda schema: {"allOf": [schema, schema, {"type": "string", "minLength": 1, "const": "a"}]},
    "anyOf": lambda schema: {"type": "object", "anyOf": [schema, {"properties": {"b": True}}]},
    "oneOf": lambda schema: {"oneOf": [schema, {"type": "string"}, {"type": "number", "minimum": 3}]},
    "properties": lambda schema: {
        "allOf": [{"properties": {"a": schema}}, {"properties": {"a": {"type": "array", "items": {}, "minItems": 1}}}]
    },
    "propertyNames": lambda schema: {"type": "object", "propertyNames": schema},
    "items": lambda schema: {"type": "array", "prefixItems": [schema], "items": schema},
    "reference": lambda schema: {"$ref": "#/$defs/x", "minProperties": 1, "$defs": {"x": schema}},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_values_of_the_wrong_kind_are_refused_or_say_nothing(place: str) -> None:
    for keyword in sorted(ENFORCED):
        for value in WRONG:
            try:
                json_spec(PLACES[place]({keyword: value}))
            except ApiError as refused:
                assert refused.status == 400 and refused.param == "response_format", (keyword, value)


@pytest.mark.parametrize("name", ["hermes", "pythonic", "gemma4", "qwen3_coder"])
def test_so_are_those_of_strict_tools(name: str) -> None:
    form = tool_formats()[name]
    for keyword in sorted(ENFORCED):
        for value in WRONG:
            for schema in ({keyword: value}, {"type": "object", "properties": {"a": {keyword: value}}}):
                try:
                    call_grammar(form, [Tool("f", schema, True)])
                except ApiError as refused:
                    is_named = refused.param == "tools" or "has more than" in refused.message
                    assert refused.status == 400 and is_named, (keyword, value)


@pytest.mark.parametrize(
    "name", ["backend", "whitespace_pattern", "disable_any_whitespace", "disable_fallback", "json_object"]
)
@pytest.mark.parametrize("value", [5, {}, ["xgrammar"], {"a": 1}])
def test_options_of_structured_outputs_of_the_wrong_kind_are_named(name: str, value: object) -> None:
    body = {"messages": [], "structured_outputs": {"json": {}, name: value}}
    with pytest.raises(ApiError, match=f"structured_outputs.{name} must be") as refused:
        request_spec(ChatRequest.model_validate(body))
    assert refused.value.param == f"structured_outputs.{name}"
