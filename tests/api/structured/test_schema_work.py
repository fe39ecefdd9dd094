"""The work for a schema is in proportion to its size: nested alternatives are looked at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from count_lines import executed_lines

from fuseline.api.prompt.grammar import json_spec
from fuseline.api.structured.ebnf import Rules
from fuseline.api.structured.interned import Interned
from fuseline.api.structured.schema import SchemaGrammar

LEAF: dict[str, Any] = {"type": "string", "maxLength": 9}
K = {"type": "object", "required": ["k"]}
NESTED: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "anyOf": lambda inner, k: {"anyOf": [inner, inner]},
    "anyOf of others": lambda inner, k: {"anyOf": [inner, {"type": "array", "items": inner}]},
    "oneOf": lambda inner, k: {
        "oneOf": [{**K, "properties": {"k": {"const": c}, "x": inner}, "additionalProperties": False} for c in (k, -k)]
    },
    "allOf": lambda inner, k: {"type": "array", "items": {"allOf": [inner, {"description": f"{k}"}]}},
    "properties": lambda inner, k: {"type": "object", "properties": {"l": inner, "r": inner}, "required": ["l"]},
}


def nested(kind: str, depth: int) -> dict[str, Any]:
    """As a body has it: no two parts are the same object."""
    schema = LEAF
    for k in range(1, depth + 1):
        schema = NESTED[kind](schema, k)
    return json.loads(json.dumps(schema))


@pytest.mark.parametrize("kind", NESTED)
def test_work_is_in_proportion_to_the_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written, dumps = [0], json.dumps

    def counting(*args: Any, **kwargs: Any) -> str:
        text = dumps(*args, **kwargs)
        written[0] += len(text)
        return text

    monkeypatch.setattr(json, "dumps", counting)
    per_size = []
    for depth in (8, 11):
        schema = nested(kind, depth if kind != "allOf" else 8 * depth)
        size, written[0] = len(dumps(schema)), 0
        lines = executed_lines(lambda schema=schema: json_spec(schema))
        assert written[0] <= size, "values are compared by their text again and again"
        per_size.append(lines / size)
    assert per_size[1] < 1.3 * per_size[0]


def test_references_that_fan_out_are_made_once() -> None:
    defs = {"d0": LEAF} | {
        f"d{k}": {"anyOf": [{"$ref": f"#/$defs/d{k - 1}"}, {"allOf": [{"$ref": f"#/$defs/d{k - 1}"}]}]}
        for k in range(1, 60)
    }
    lines = executed_lines(lambda: json_spec({"$ref": "#/$defs/d59", "$defs": defs}))
    assert lines < 60_000


def test_alternatives_are_compared_once() -> None:
    """256 alternatives of 256 references each exclude others, or it is soon known that they do not."""
    leaf = {"anyOf": [{"$ref": "#/$defs/s"}] * 256}
    schema = {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
              "$defs": {"a": {"anyOf": [leaf] * 256}, "b": {"anyOf": [{"type": "null"}] * 256}, "s": LEAF}}  # fmt: skip
    grammar = SchemaGrammar(schema, Rules(), "guided_json")
    assert executed_lines(grammar.expression) < 400_000


def test_numbers_are_those_of_equal_values() -> None:
    interned = Interned()
    values = [1, 1.0, True, "1", None, [1], [True], {}, [], {"a": 1}, {"a": 1, "b": 2}, {"b": 2, "a": 1}]
    numbers = [interned.number(value) for value in values]
    assert len(set(numbers)) == len(values)
    assert [interned.number(value) for value in json.loads(json.dumps(values))] == numbers
