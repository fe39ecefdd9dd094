"""Which keywords of JSON schemas are enforced, which say nothing about values, and which cannot be enforced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fuseline.api.errors import ApiError

BY_TYPE: dict[str, frozenset[str]] = {
    "object": frozenset((
        "properties required additionalProperties patternProperties propertyNames minProperties maxProperties "
        "unevaluatedProperties"
    ).split()),
    "array": frozenset("items prefixItems additionalItems minItems maxItems uniqueItems unevaluatedItems".split()),
    "string": frozenset("minLength maxLength pattern format".split()),
    "number": frozenset("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split()),
}
ENFORCED = frozenset({"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"}).union(*BY_TYPE.values())
ANNOTATIONS = frozenset((
    "title description default example examples $schema $id id $comment deprecated readOnly writeOnly $defs "
    "definitions discriminator nullable propertyOrdering externalDocs xml strict"
).split())
TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value == int(value),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}

Refuse = Callable[[str, str], ApiError]


MAPS = frozenset("properties patternProperties $defs definitions".split())
COUNTS = frozenset("minLength maxLength minItems maxItems minProperties maxProperties".split())
LISTS = frozenset("anyOf oneOf allOf prefixItems".split())
SINGLE = frozenset("additionalProperties propertyNames unevaluatedProperties additionalItems unevaluatedItems".split())
PLAIN_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (lambda value: _are_texts([value] if isinstance(value, str) else value), "a type or a list of types"),
    "enum": (lambda value: isinstance(value, list), "a list of values"),
    "required": (lambda value: _are_texts(value), "a list of names"),
    "$ref": (lambda value: isinstance(value, str), "a text"),
    "uniqueItems": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(("pattern", "format"), (lambda value: isinstance(value, str | None), "a text")),
    **dict.fromkeys(COUNTS, (lambda value: value is None or type(value) is int, "an integer, 0 or more")),
    **dict.fromkeys(BY_TYPE["number"], (lambda value: value is None or TYPES["number"](value), "a number")),
}
"""Keywords that hold no schemas -> what their values must be. What is None is not there."""


def check_kinds(root: Any, refuse: Refuse, seen: set[int]) -> None:
    """Raises ApiError 400 for the first keyword whose value is of the wrong kind, in `root` or within it.

    `seen`: ids of the schemas that have been looked at, all of which live on.
    """
    waiting = [root]
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, bool) or id(schema) in seen:
            continue
        if not isinstance(schema, dict):
            raise refuse("schema", "a schema must be an object or a boolean")
        seen.add(id(schema))
        for keyword, value in schema.items():
            if keyword in PLAIN_KINDS and not PLAIN_KINDS[keyword][0](value):
                raise refuse(keyword, f"must be {PLAIN_KINDS[keyword][1]}")
            waiting += _schemas_in(keyword, value, refuse)


def _schemas_in(keyword: str, value: Any, refuse: Refuse) -> Iterable[Any]:
    """Schemas that a keyword holds."""
    if keyword in MAPS:
        if not isinstance(value, dict):
            raise refuse(keyword, "must be an object")
        return value.values()
    if keyword in LISTS or (keyword == "items" and isinstance(value, list)):
        if not isinstance(value, list):
            raise refuse(keyword, "must be a list of schemas")
        return value
    return (value,) if keyword in SINGLE or keyword == "items" else ()


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def check_keywords(schema: dict[str, Any], refuse: Refuse) -> None:
    """Raises ApiError 400 for the first keyword that would be ignored."""
    for keyword in schema:
        if keyword not in ENFORCED and keyword not in ANNOTATIONS and not keyword.startswith("x-"):
            raise refuse(keyword, "this keyword of JSON schemas is not supported")
    if "$ref" not in schema and schema.get("unevaluatedItems", False) is not False:
        raise refuse("unevaluatedItems", "only false is supported")


def without_annotations(schema: dict[str, Any]) -> list[str]:
    """Keywords that say something about values."""
    return [keyword for keyword in schema if keyword in ENFORCED]


def implied_types(schema: dict[str, Any]) -> list[str]:
    """Types that the keywords of a schema without `type` speak of."""
    return [kind for kind, names in BY_TYPE.items() if not names.isdisjoint(schema)] or list(TYPES)
