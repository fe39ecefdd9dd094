"""Arguments that a model writes as plain text, as JSON of the type that the tool's schema asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fuseline.api.parsers.json_text import rewritten
from fuseline.api.parsers.source import NotACall

WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}
MAX_DEPTH = 16
"""Nesting of anyOf, oneOf and allOf that is looked into."""


def types_of(schema: object, name: str) -> set[str]:
    """JSON types that an argument may have; empty where the schema does not say."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    found = properties.get(name) if isinstance(properties, Mapping) else None
    return _types(found, schema, MAX_DEPTH)


def _types(schema: object, root: object, depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or not depth:
        return set()
    if isinstance(ref := schema.get("$ref"), str):
        return _types(_target(ref, root), root, depth - 1)
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {each for each in kind if isinstance(each, str)}
    if isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
        return {_type_of(value) for value in values}
    inner = [each for key in ("anyOf", "oneOf", "allOf") if isinstance(each := schema.get(key), list)]
    return {kind for choices in inner for choice in choices for kind in _types(choice, root, depth - 1)}


def _target(ref: str, root: object) -> object:
    """Return the part of the schema that `#/$defs/X` names."""
    for key in ref.removeprefix("#/").split("/"):
        root = root.get(key) if isinstance(root, Mapping) else None
    return root


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def is_text(schema: object, name: str) -> bool:
    """Whether an argument can only be a string."""
    return types_of(schema, name) == {"string"}


def as_json(text: str, schema: object, name: str) -> str:
    """`text` as JSON of a type that the schema allows, else as a string."""
    text = text.removeprefix("\n").removesuffix("\n")
    types = types_of(schema, name)
    bare = text.strip()
    if "string" in types:
        return "null" if bare == "null" and "null" in types else json.dumps(text, ensure_ascii=False)
    if "boolean" in types or "null" in types or not types:
        word = WORDS.get(bare.lower() if types else bare)
        if word is not None:
            return word
    try:
        return rewritten(bare)
    except NotACall:
        return json.dumps(text, ensure_ascii=False)
