"""Which keywords of JSON schemas are enforced, which say nothing about values, and which cannot be enforced."""

from __future__ import annotations

from collections.abc import Callable
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
