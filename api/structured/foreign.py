"""Which JSON schemas the packages of other backends hold to the letter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fuseline.api.structured.keywords import ANNOTATIONS, TYPES

RANGE = r"(?:[a-z]-[a-z]|[A-Z]-[A-Z]|[0-9]-[0-9]|[A-Za-z0-9 _@:/,;.#])"
SAFE_PATTERN = re.compile(
    rf"(?:[A-Za-z0-9 _@:/,;#%&=<>~!+\-*?|){{}}]|\((?!\?)|\(\?:|\[{RANGE}+-?\]|\\[dw.+*?()\[\]{{}}|$^-])+"
)
"""Regexes that match no quote, backslash or control character: they are put into a string's quotes as they are."""


@dataclass(frozen=True)
class SchemaSupport:
    """Keywords that a backend enforces; it ignores all others."""

    by_type: dict[str, frozenset[str]] = field(default_factory=dict)
    formats: frozenset[str] = frozenset()
    has_recursion: bool = False
    has_plain_strings_only: bool = False
    """Constants are strings without a character that JSON escapes."""


OUTLINES = SchemaSupport(
    by_type={
        "object": frozenset({"properties", "required", "additionalProperties"}),
        "array": frozenset({"items", "minItems", "maxItems"}),
        "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    },
    formats=frozenset({"uuid"}),
)
FORMAT_ENFORCER = SchemaSupport(
    by_type={
        "object": frozenset({"properties", "required", "additionalProperties"}),
        "array": frozenset({"items", "minItems", "maxItems"}),
        "string": frozenset({"maxLength"}),
    },
    has_recursion=True,
    has_plain_strings_only=True,
)


def unsupported(schema: Any, support: SchemaSupport) -> str:
    """Why a backend cannot hold a schema; empty if it can."""
    return _Check(schema, support).reason(schema)


def refused_by_guidance(schema: Any) -> str:
    """Why guidance cannot hold a schema: it says so itself, but for formats of which it takes texts that are none."""
    from llguidance import LLMatcher

    if _has_format(schema, ("time", "date-time")):
        return "format time"
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    return LLMatcher.validate_grammar(grammar).partition("\n")[0][:200]


def _has_format(schema: Any, formats: tuple[str, ...]) -> bool:
    if isinstance(schema, list):
        return any(_has_format(item, formats) for item in schema)
    if not isinstance(schema, dict):
        return False
    return schema.get("format") in formats or any(_has_format(item, formats) for item in schema.values())


class _Check:
    def __init__(self, root: Any, support: SchemaSupport) -> None:
        self._root, self._support = root, support
        self._references: dict[str, str | None] = {}
        """Reasons of those looked at; None while one is."""

    def reason(self, schema: Any) -> str:
        if not isinstance(schema, dict):
            return "a schema that is no object"
        keywords = set(schema) - ANNOTATIONS
        for keyword, check in (("$ref", self._reference), ("anyOf", self._any_of), ("enum", self._constants)):
            if keyword in keywords:
                return check(schema, keywords)
        if "const" in keywords:
            return self._constants({**schema, "enum": [schema["const"]]}, keywords - {"const"} | {"enum"})
        return self._typed(schema, keywords)

    def _typed(self, schema: dict[str, Any], keywords: set[str]) -> str:
        kind = schema.get("type")
        if not isinstance(kind, str) or kind not in TYPES:
            return "a schema without one type"
        if unknown := sorted(keywords - {"type"} - self._support.by_type.get(kind, frozenset())):
            return unknown[0]
        if kind == "object":
            return self._object(schema)
        if kind == "array":
            return self.reason(schema["items"]) if "items" in schema else "an array without items"
        return self._string(schema) if kind == "string" else ""

    def _object(self, schema: dict[str, Any]) -> str:
        properties, required = schema.get("properties"), schema.get("required", [])
        if not isinstance(properties, dict) or not properties:
            return "an object without properties"
        if schema.get("additionalProperties", False) is not False:
            return "additionalProperties"
        if not isinstance(required, list) or not all(name in properties for name in required):
            return "required"
        if not all(_is_plain(name) for name in properties):
            return "the name of a property that JSON escapes"
        return self._first(self.reason(value) for value in properties.values())

    def _string(self, schema: dict[str, Any]) -> str:
        pattern = schema.get("pattern")
        if len({"pattern", "format"} & set(schema)) + bool({"minLength", "maxLength"} & set(schema)) > 1:
            return "a pattern or format beside another bound of a string"
        if pattern is not None and not (isinstance(pattern, str) and _is_safe(pattern)):
            return "a pattern that may match a character that JSON escapes"
        if "format" in schema and schema["format"] not in self._support.formats:
            return "format"
        return ""

    def _constants(self, schema: dict[str, Any], keywords: set[str]) -> str:
        values = schema["enum"]
        if not isinstance(values, list) or not values or keywords - {"enum", "type"}:
            return "enum beside other keywords"
        if self._support.has_plain_strings_only and not all(isinstance(v, str) and _is_plain(v) for v in values):
            return "constants other than plain strings"
        kind = schema.get("type")
        if kind is not None and not all(isinstance(kind, str) and kind in TYPES and TYPES[kind](v) for v in values):
            return "enum with values of another type"
        return "" if all(v is None or isinstance(v, str | int | float) for v in values) else "enum"

    def _any_of(self, schema: dict[str, Any], keywords: set[str]) -> str:
        if keywords != {"anyOf"} or not isinstance(schema["anyOf"], list) or not schema["anyOf"]:
            return "anyOf beside other keywords"
        return self._first(map(self.reason, schema["anyOf"]))

    def _reference(self, schema: dict[str, Any], keywords: set[str]) -> str:
        reference = schema["$ref"]
        match = re.fullmatch(r"#/(\$defs|definitions)/(\w+)", reference) if isinstance(reference, str) else None
        if not match or keywords != {"$ref"} or ("$defs" in self._root and "definitions" in self._root):
            return "$ref"
        target = self._root.get(match[1], {}).get(match[2])
        if reference not in self._references:
            self._references[reference] = None
            self._references[reference] = self.reason(target)
        found = self._references[reference]
        return ("" if self._support.has_recursion else "recursion") if found is None else found

    @staticmethod
    def _first(reasons: Iterable[str]) -> str:
        return next(filter(None, reasons), "")


def _is_plain(text: str) -> bool:
    return json.dumps(text) == f'"{text}"'


def _is_safe(pattern: str) -> bool:
    bare = pattern.removeprefix("^").removesuffix("$")
    return SAFE_PATTERN.fullmatch(bare) is not None
