"""The schema of values that are valid under two schemas."""

from __future__ import annotations

import json
from typing import Any

from fuseline.api.structured.keywords import ANNOTATIONS, TYPES

LARGEST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
SMALLEST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
Schema = dict[str, Any] | bool


class Conflict(Exception):
    """Both schemas have a keyword, and no single one says what both say."""

    def __init__(self, keyword: str, reason: str = "two different ones cannot be enforced together") -> None:
        super().__init__(keyword)
        self.keyword = keyword
        self.reason = reason


def merge(first: Schema, second: Schema) -> Schema:
    """False where no value can be valid. Raises Conflict."""
    if first is False or second is False:
        return False
    first, second = _set_fields(first), _set_fields(second)
    found = {**first, **second}
    if not _merge_objects(first, second, found):
        return False
    for keyword in first.keys() & second.keys() - ANNOTATIONS:
        if keyword in ("properties", "additionalProperties") or _equal(first[keyword], second[keyword]):
            continue
        value = _both(keyword, first[keyword], second[keyword])
        if value is None:
            return False
        found[keyword] = value
    return _filtered(found)


def _set_fields(schema: Schema) -> dict[str, Any]:
    """The keywords that say something: null is no value of any but `const`."""
    if schema is True:
        return {}
    if None not in schema.values():
        return schema
    return {key: value for key, value in schema.items() if value is not None or key == "const"}


def _both(keyword: str, a: Any, b: Any) -> Any:
    """What both values of a keyword say together; None if nothing can be valid."""
    if keyword in LARGEST:
        return max(a, b)
    if keyword in SMALLEST:
        return min(a, b)
    if keyword == "required":
        return list(dict.fromkeys([*a, *b]))
    if keyword == "type":
        return _types(a, b)
    if keyword == "enum":
        return [value for value in a if any(_equal(value, other) for other in b)] or None
    if keyword == "const":
        return None
    if keyword == "items" and isinstance(a, dict | bool) and isinstance(b, dict | bool):
        return merge(a, b)
    if keyword in ("uniqueItems",):
        return bool(a or b)
    raise Conflict(keyword)


def _types(a: str | list[str], b: str | list[str]) -> list[str] | None:
    ours, theirs = ([kind] if isinstance(kind, str) else kind for kind in (a, b))
    found = [kind for kind in ours if kind in theirs]
    has_integer = "integer" in ours and "number" in theirs or "integer" in theirs and "number" in ours
    if has_integer and "integer" not in found:
        found.append("integer")
    return found or None


def _merge_objects(first: dict[str, Any], second: dict[str, Any], found: dict[str, Any]) -> bool:
    """Properties of both, each also held to the other's additionalProperties. False if a required one cannot be."""
    if "properties" not in found and not ("additionalProperties" in first and "additionalProperties" in second):
        return True
    ours, theirs = first.get("properties", {}), second.get("properties", {})
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        raise Conflict("properties", "must be an object")
    others = (first.get("additionalProperties", True), second.get("additionalProperties", True))
    properties: dict[str, Schema] = {}
    for name in dict.fromkeys([*ours, *theirs]):
        properties[name] = merge(ours.get(name, others[0]), theirs.get(name, others[1]))
    if properties:
        found["properties"] = properties
    if "additionalProperties" in first or "additionalProperties" in second:
        found["additionalProperties"] = merge(*others)
    return True


def _filtered(schema: dict[str, Any]) -> Schema:
    """Constants beside `type` that have it."""
    if "enum" in schema and "const" in schema:
        if not any(_equal(schema["const"], value) for value in schema["enum"]):
            return False
        schema = {key: value for key, value in schema.items() if key != "enum"}
    if "const" in schema and "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(kind in TYPES and TYPES[kind](schema["const"]) for kind in kinds):
            return False
    return schema


def _equal(a: Any, b: Any) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
