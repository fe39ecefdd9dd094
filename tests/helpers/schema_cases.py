"""JSON schemas made of building blocks: one by one, nested, and combined, and what cannot be enforced."""

from __future__ import annotations

import random
from typing import Any

NAME = {"type": "string", "maxLength": 12}
LEAVES: list[dict[str, Any] | bool] = [
    {"type": "null"},
    {"type": "boolean"},
    {"type": "integer"},
    {"type": "number"},
    NAME,
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "string", "pattern": "^[a-z]{2,6}$"},
    {"type": "string", "pattern": r"^\d{3}-\d{4}$"},
    {"type": "string", "pattern": r"^(\([0-9]{3}\))?[0-9]{3}$"},
    {"type": "string", "pattern": "^[^a-c]{1,3}$"},
    {"type": "string", "pattern": r"^\w{1,8}$", "maxLength": 8},
    {"type": "string", "pattern": r'^["\\]{1,2}$'},
    {"type": "string", "pattern": r"^a.b$"},
    {"type": "string", "pattern": "cat|dog"},
    {"type": "string", "pattern": r"^\S{1,4}\s\D{1,4}\W$"},
    {"type": "string", "pattern": "^é[à-ü]{0,3}中?$"},
    *(
        {"type": "string", "format": name}
        for name in (
            "date",
            "date-time",
            "duration",
            "email",
            "hostname",
            "ipv4",
            "ipv6",
            "uuid",
            "uri",
            "uri-reference",
            "json-pointer",
            "time",
        )
    ),
    {"type": "integer", "minimum": 0},
    {"type": "integer", "maximum": -5},
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 10},
    {"type": "integer", "minimum": 10**17},
    {"type": "integer", "minimum": 1.5, "maximum": 1003},
    {"type": "integer", "minimum": 98, "maximum": 1203},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    {"type": "integer", "format": "int32"},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "number", "minimum": -2.5, "maximum": 2.25},
    {"type": "number", "minimum": 99.95},
    {"type": "number", "exclusiveMaximum": -0.125},
    {"type": "number", "minimum": 3.14, "maximum": 3.15},
    {"type": "number", "exclusiveMinimum": 1000.5, "maximum": 1001},
    {"minimum": 5},
    {"maxLength": 4},
    {"const": "x"},
    {"const": {"a": [1, None]}},
    {"enum": ["red", "green", 3, None, True, {"k": 'é"\\'}]},
    {"type": "string", "enum": ["a", "ab", 1]},
    {"enum": [1.5, -2]},
    {"type": ["string", "null"], "maxLength": 5},
    {"type": ["integer", "boolean"]},
    {"type": ["number", "array"], "minimum": 2, "maxItems": 2, "items": {"type": "null"}},
]


def combined(leaf: Any, other: Any) -> list[dict[str, Any]]:
    """Schemas around two others, each with another keyword."""
    return [
        {"type": "array", "items": leaf, "minItems": 1, "maxItems": 3},
        {"type": "array", "prefixItems": [leaf, other], "minItems": 1, "items": False},
        {"type": "array", "prefixItems": [leaf], "items": other, "minItems": 2, "maxItems": 3},
        {"type": "object", "properties": {"a": leaf, "b": other}, "required": ["a"]},
        {
            "type": "object",
            "properties": {"a": leaf, "b": other, "c": leaf},
            "required": ["b"],
            "additionalProperties": False,
        },
        {"type": "object", "properties": {'x"y\n': leaf, "": other}, "required": ["", 'x"y\n']},
        {
            "type": "object",
            "properties": {"ab": leaf},
            "required": ["ab", "z"],
            "additionalProperties": other,
            "maxProperties": 3,
        },
        {"type": "object", "properties": {"a": leaf, "b": other, "c": leaf}, "minProperties": 2, "maxProperties": 2},
        {
            "type": "object",
            "patternProperties": {"^x_[a-z]{1,3}$": leaf},
            "additionalProperties": False,
            "maxProperties": 2,
        },
        {"type": "object", "propertyNames": {"enum": ["k", "l"]}, "additionalProperties": leaf, "maxProperties": 2},
        {"anyOf": [leaf, {"type": "object", "properties": {"o": other}, "required": ["o"]}]},
        {
            "oneOf": [
                {"type": "object", "properties": {"t": {"const": "p"}, "v": leaf}, "required": ["t", "v"]},
                {"type": "object", "properties": {"t": {"const": "q"}, "w": other}, "required": ["t"]},
            ]
        },
        {
            "allOf": [
                {"type": "object", "properties": {"a": leaf}, "required": ["a"]},
                {"properties": {"b": other}, "required": ["b"]},
            ]
        },
        {"$defs": {"d": leaf}, "type": "object", "properties": {"r": {"$ref": "#/$defs/d"}}, "required": ["r"]},
        {"definitions": {"a/b": other}, "type": "array", "items": {"$ref": "#/definitions/a~1b"}, "maxItems": 2},
        {
            "$defs": {
                "n": {
                    "type": "object",
                    "properties": {"v": leaf, "k": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}},
                    "required": ["v"],
                }
            },
            "$ref": "#/$defs/n",
        },
        {
            "type": "object",
            "properties": {"a": leaf},
            "required": ["a"],
            "anyOf": [{"properties": {"b": other}, "required": ["b"]}, {"properties": {"c": leaf}, "required": ["c"]}],
        },
        {"title": "T", "description": "d", "type": "object", "properties": {"a": {"default": 1, **leaf}}, "x-order": 1},
    ]


def schemas(count: int = 320) -> list[dict[str, Any]]:
    """The leaves, then combinations, the same in each run."""
    rng = random.Random(8)
    found: list[dict[str, Any]] = list(LEAVES)
    while len(found) < count:
        found += combined(rng.choice(LEAVES), rng.choice(LEAVES))
        nested = rng.choice(combined(rng.choice(LEAVES), rng.choice(LEAVES)))
        if "$defs" not in nested and "definitions" not in nested:
            found.append(rng.choice(combined(nested, rng.choice(LEAVES))[:8]))
    return found[:count]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"not": {"type": "null"}}, "not"),
    ({"if": {"type": "integer"}, "then": {"minimum": 3}}, "if"),
    ({"type": "array", "items": {"type": "boolean"}, "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": {"const": 5}}, "contains"),
    ({"type": "array", "minContains": 1}, "minContains"),
    ({"type": "integer", "multipleOf": 7}, "multipleOf"),
    ({"type": "number", "multipleOf": 0.1}, "multipleOf"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
    ({"dependencies": {}}, "dependencies"),
    ({"type": "string", "contentEncoding": "base64"}, "contentEncoding"),
    ({"type": "string", "format": "iri"}, "format"),
    ({"type": "string", "format": "zzz"}, "format"),
    ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "maxLength"),
    ({"type": "string", "pattern": "^(?=a)b"}, "lookahead"),
    ({"type": "string", "pattern": r"(a)\1"}, "back reference"),
    ({"type": "string", "pattern": "("}, "regex"),
    ({"$ref": "#/$defs/zz"}, "$ref"),
    ({"$ref": "http://x/y"}, "$ref"),
    ({"$ref": "#"}, "$ref"),
    ({"$dynamicRef": "#a"}, "$dynamicRef"),
    ({"$anchor": "a"}, "$anchor"),
    ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 3}]}, "oneOf"),
    ({"type": "int"}, "type"),
    ({"type": "object", "minProperties": 3, "additionalProperties": {"type": "null"}}, "minProperties"),
    ({"type": "object", "patternProperties": {"a": {}, "b": {}}}, "patternProperties"),
    ({"enum": []}, "enum"),
    ({"type": "object", "properties": {"a": {}}, "propertyNames": {"maxLength": 1}}, "propertyNames"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ({"type": "string", "minLength": -1}, "minLength"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
    ({"type": "integer", "const": "a"}, "enum"),
    ({"enum": ["a", "bb"], "maxLength": 1}, "maxLength"),
    ({"unevaluatedItems": {"type": "null"}}, "unevaluatedItems"),
    ({"foo": 1}, "foo"),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "pattern"),
]
"""Schemas and the word that the error must have."""
REGEXES = [
    r"\d{3}-[a-z]+\.",
    r"(yes|no|maybe)",
    r"[A-Z][a-z]{1,9}( [A-Z][a-z]{1,9})?",
    r"^#[0-9a-fA-F]{6}$",
    r"\$\d+\.\d\d",
    r"a|b*c",
    r"(?:[01]\d|2[0-3]):[0-5]\d",
    r"\w{1,8}@\w{1,8}\.com\n",
    r"[^\d\s]{2,4}",
    r".{1,5}!",
    r"x{0,3}y?z+",
    r"[à-ü]{2}",
    r"(?P<y>19|20)\d\d",
    r"\"[^\"]{0,5}\"",
    r"(a(b(c)?)?)?d",
    r"\W{1,2}\D\S",
    r"[\w.-]{1,8}",
    r"(?s)a.c",
    r"(?<year>\d{4})-W\d\d",
    "\u4e2d{1,2}",
]
