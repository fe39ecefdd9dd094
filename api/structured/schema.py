"""JSON schemas to grammars. Every keyword is enforced, an annotation, or refused with its name: none is ignored.

The values of a grammar are some of those that are valid, never others. Objects have their properties in the order of
the schema, and only those, unless additionalProperties (or the lack of properties) says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from fuseline.api.errors import ApiError, bad_request
from fuseline.api.structured import numbers
from fuseline.api.structured.counts import read_count
from fuseline.api.structured.disjoint import Disjoint
from fuseline.api.structured.ebnf import Rules, char_set, choice, repeat, sequence
from fuseline.api.structured.formats import FORMATS, INTEGER_FORMATS, NO_LIMIT
from fuseline.api.structured.interned import Interned
from fuseline.api.structured.json_text import WHITESPACE
from fuseline.api.structured.keywords import TYPES, check_keywords, check_kinds, implied_types, without_annotations
from fuseline.api.structured.merge import Conflict, merge
from fuseline.api.structured.notation import JSON, Notation, Quoted
from fuseline.api.structured.objects import ObjectGrammar
from fuseline.api.structured.regex import RegexGrammar

MAX_VARIANTS = 256
"""Alternatives that anyOf and oneOf within allOf may multiply to."""
Schema = dict[str, Any] | bool


class SchemaGrammar:
    """The grammar of one schema. `whitespace`: expression between tokens. Errors name `param` and keyword."""

    def __init__(
        self, root: Schema, rules: Rules, param: str, whitespace: str = WHITESPACE, notation: Notation = JSON
    ) -> None:
        self.rules = rules
        self.param = param
        self.blank = rules.add(whitespace, "blank")
        self._root = root
        self.interned = Interned()
        self._made: dict[int, str] = {}
        self._checked: set[int] = set()
        self._resolved: dict[int, dict[str, Any]] = {}
        self._disjoint = Disjoint(self.resolved, self.interned)
        self._any: str | None = None
        self._any_text: str | None = None
        self.notation = notation
        within = notation.inner
        self.inner = self if within is None else SchemaGrammar(root, rules, param, whitespace, within)
        """The grammar of values within this one's objects."""
        self._objects = ObjectGrammar(self)

    def expression(self) -> str:
        """Raises ApiError 400."""
        check_kinds(self._root, self.refuse, self._checked)
        return self.value(self._root)

    def arguments(self) -> str:
        """The values that are objects, as the arguments of a call are. Raises ApiError 400."""
        check_kinds(self._root, self.refuse, self._checked)
        is_object = isinstance(self._root, dict) and self._root.get("type") == "object"
        return self.value(self._root if is_object else {"allOf": [self._root, {"type": "object"}]})

    def refuse(self, keyword: str, reason: str) -> ApiError:
        return bad_request(f"{self.param}: {keyword}: {reason}", self.param, "unsupported_value")

    def value(self, schema: Schema) -> str:
        """Name of the rule for the values of a schema."""
        if schema is True:
            schema = {}
        if schema is False:
            raise self.refuse("false", "no value can be valid")
        if not isinstance(schema, dict):
            raise self.refuse("schema", "a schema must be an object or a boolean")
        key = self.interned.number(schema)
        if key not in self._made:
            name = self._made[key] = self.rules.reserve("v")
            self.rules.define(name, self._value(schema))
        return self._made[key]

    def _value(self, schema: dict[str, Any]) -> str:
        check_keywords(schema, self.refuse)
        plain = self.resolved(schema)
        for keyword in ("anyOf", "oneOf"):
            if keyword in plain:
                return self._alternatives(plain, keyword)
        if "const" in plain or "enum" in plain:
            return self._constants(plain)
        if not without_annotations(plain):
            return self._any_value()
        types = self._types(plain)
        return choice(part for kind in types for part in [self._typed(kind, plain)])

    def resolved(self, schema: Schema) -> dict[str, Any]:
        """The same schema without $ref and allOf at its top."""
        if schema is False:
            raise self.refuse("false", "no value can be valid")
        if schema is True or not ("$ref" in schema or "allOf" in schema):
            return {} if schema is True else schema
        key = self.interned.number(schema)
        if key not in self._resolved:
            self._resolved[key] = self._resolve(schema)
        return self._resolved[key]

    def _resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        seen: set[str] = set()
        plain = schema
        while "$ref" in plain or "allOf" in plain:
            rest = {key: value for key, value in plain.items() if key not in ("$ref", "allOf")}
            parts = list(self._list(plain, "allOf")) if "allOf" in plain else []
            if "$ref" in plain:
                if plain["$ref"] in seen:
                    raise self.refuse("$ref", f"{plain['$ref']!r} refers to itself")
                seen.add(plain["$ref"])
                parts.append(self._target(plain["$ref"]))
            plain = self._merged([rest, *parts])
        return plain

    def _merged(self, parts: list[Schema]) -> dict[str, Any]:
        found: Schema = {}
        for part in parts:
            if isinstance(part, dict):
                check_keywords(part, self.refuse)
            try:
                found = merge(found, part)
            except Conflict as conflict:
                raise self.refuse(conflict.keyword, conflict.reason) from conflict
            if found is False:
                raise self.refuse("allOf", "no value can be valid")
        return found if isinstance(found, dict) else {}

    def _target(self, reference: Any) -> Schema:
        """The schema that a $ref of this document points to."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise self.refuse("$ref", f"{reference!r}: only references within the schema (#/...) are supported")
        found: Any = self._root
        for part in reference[2:].split("/") if len(reference) > 2 else ():
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdigit() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, dict) and name in found:
                found = found[name]
            else:
                raise self.refuse("$ref", f"{reference!r} is not in the schema")
        if not isinstance(found, dict | bool):
            raise self.refuse("$ref", f"{reference!r} is no schema")
        check_kinds(found, self.refuse, self._checked)
        return found

    def _list(self, schema: dict[str, Any], keyword: str) -> list[Schema]:
        found = schema[keyword]
        if not isinstance(found, list) or not found:
            raise self.refuse(keyword, "must be a list of schemas")
        if len(found) > MAX_VARIANTS:
            raise self.refuse(keyword, f"more than {MAX_VARIANTS} alternatives")
        return found

    def _alternatives(self, schema: dict[str, Any], keyword: str) -> str:
        rest = {key: value for key, value in schema.items() if key != keyword}
        branches = [branch for branch in self._list(schema, keyword) if branch is not False]
        if not branches:
            raise self.refuse(keyword, "no value can be valid")
        if keyword == "oneOf" and not all(
            self._disjoint.holds(self.resolved(a), self.resolved(b))
            for index, a in enumerate(branches)
            for b in branches[:index]
        ):
            reason = "a value might be valid under two of its schemas: give each its own type or const property"
            raise self.refuse(keyword, reason)
        if not without_annotations(rest):
            return choice(self.value(branch) for branch in branches)
        variants = [self._try_merged([rest, branch]) for branch in branches]
        if not any(variants):
            raise self.refuse(keyword, "no value can be valid together with the keywords beside it")
        return choice(self.value(variant) for variant in variants if variant is not None)

    def _try_merged(self, parts: list[Schema]) -> dict[str, Any] | None:
        found: Schema = {}
        for part in parts:
            try:
                found = merge(found, self.resolved(part))
            except Conflict as conflict:
                raise self.refuse(conflict.keyword, conflict.reason) from conflict
        return found if isinstance(found, dict) else None

    def _constants(self, schema: dict[str, Any]) -> str:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or not values:
            raise self.refuse("enum", "must be a list of values")
        for keyword in without_annotations(schema):
            if keyword not in ("const", "enum", "type"):
                raise self.refuse(keyword, "is not supported beside const or enum")
        if "const" in schema and "enum" in schema:
            values = [value for value in schema["enum"] if json.dumps(value) == json.dumps(schema["const"])]
        if "type" in schema:
            allowed = self._types(schema)
            values = [value for value in values if any(TYPES[kind](value) for kind in allowed)]
        if not values:
            raise self.refuse("enum", "no value has the type of the schema")
        return self.constants(values)

    def constants(self, values: Iterable[Any]) -> str:
        """One of the values."""
        found = [(value, self.notation.texts(value)) for value in values]
        if bad := [value for value, texts in found if not texts]:
            raise self.refuse("enum", f"{str(bad[0])[:50]!r} cannot be written in the format of this model")
        return self.notation.constants(self.rules, [text for _, texts in found for text in texts])

    def _types(self, schema: dict[str, Any]) -> list[str]:
        given = schema.get("type", implied_types(schema))
        types = [given] if isinstance(given, str) else given
        if not isinstance(types, list) or not types or any(kind not in TYPES for kind in types):
            raise self.refuse("type", f"must be among {', '.join(TYPES)}")
        return [kind for kind in types if not (kind == "integer" and "number" in types)]

    def _typed(self, kind: str, schema: dict[str, Any]) -> str:
        if kind == "null":
            return self.constants([None])
        if kind == "boolean":
            return self.constants([True, False])
        if kind in ("integer", "number"):
            return self._number(kind, schema)
        if kind == "string":
            return self._string(schema)
        return self._array(schema) if kind == "array" else self._objects.expression(schema)

    def _any_value(self) -> str:
        if self._any is None:
            name = self._any = self.rules.reserve("any")
            blank = self.blank
            words = self.constants([True, False, None])
            pair = f'{self._objects.any_key()} "{self.notation.colon}" {blank} {name}'
            more, more_pairs = f'("," {blank} {name})*', f'("," {blank} {pair})*'
            self.rules.define(name, (
                f'{self.any_string()} | {numbers.NUMBER} | {words}'
                f' | "[" {blank} ({name} {more} {blank})? "]" | "{{" {blank} ({pair} {more_pairs} {blank})? "}}"'
            ))  # fmt: skip
        return self._any

    def _number(self, kind: str, schema: dict[str, Any]) -> str:
        low, high = self._bounds(schema)
        found = None
        step = schema.get("multipleOf")
        if kind == "integer" or step is not None:
            whole_low = None if low is None else _floor(low.value, low.is_strict)
            whole_high = None if high is None else -_floor(-high.value, high.is_strict)
            if kind == "integer" and (limits := INTEGER_FORMATS.get(schema.get("format"))):
                whole_low = max(limits[0], whole_low) if whole_low is not None else limits[0]
                whole_high = min(limits[1], whole_high) if whole_high is not None else limits[1]
            if step in (None, 1):
                found = numbers.integer(whole_low, whole_high)
            else:
                found = self._multiples(step, whole_low, whole_high)
        else:
            found = numbers.decimal(low, high)
        if found is None:
            raise self.refuse("minimum", "no number lies within the bounds")
        return found

    def _multiples(self, step: Any, low: int | None, high: int | None) -> str | None:
        if not isinstance(step, int) or isinstance(step, bool) or step < 1:
            raise self.refuse("multipleOf", "only positive integers are supported")
        if low is None or high is None or (high - low) // step >= 1000:
            raise self.refuse("multipleOf", "needs a minimum and a maximum with at most 1000 multiples between them")
        return numbers.multiples(step, low, high)

    def _bounds(self, schema: dict[str, Any]) -> tuple[numbers.Bound | None, numbers.Bound | None]:
        lows = [self._bound(schema, "minimum", False), self._bound(schema, "exclusiveMinimum", True)]
        highs = [self._bound(schema, "maximum", False), self._bound(schema, "exclusiveMaximum", True)]
        low = max((bound for bound in lows if bound), key=lambda b: (b.value, b.is_strict), default=None)
        high = min((bound for bound in highs if bound), key=lambda b: (b.value, not b.is_strict), default=None)
        return low, high

    def _bound(self, schema: dict[str, Any], keyword: str, is_strict: bool) -> numbers.Bound | None:
        value = schema.get(keyword)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(keyword, "must be a number")
        if abs(value) > 10**30 or (value and abs(value) < 10**-12):
            raise self.refuse(keyword, "is too large or too close to 0 to be enforced")
        return numbers.Bound(Decimal(repr(value)), is_strict)

    def count(self, schema: dict[str, Any], keyword: str, default: int | None) -> int | None:
        return read_count(schema, keyword, default, self.refuse)

    def any_string(self) -> str:
        if self._any_text is None:
            self._any_text = choice(form.any_string(self.rules) for form in self.notation.strings)
        return self._any_text

    def _string(self, schema: dict[str, Any]) -> str:
        """Bounded ones without escapes: xgrammar counts characters fast only where each is of one set."""
        low, high = self.count(schema, "minLength", 0), self.count(schema, "maxLength", None)
        if high is not None and low > high:
            raise self.refuse("minLength", "is above maxLength")
        pattern, name = schema.get("pattern"), schema.get("format")
        if name in NO_LIMIT:
            name = None
        if pattern is None and name is None:
            if (low, high) == (0, None):
                return self.any_string()
            return choice(
                self.rules.add(form.around(self.rules.repeat(char_set(form.raw), low, high)), "string")
                for form in self.notation.strings
            )
        if pattern is not None and name is not None:
            raise self.refuse("format", "is not supported together with pattern")
        if name is not None and name not in FORMATS:
            raise self.refuse("format", f"{name!r} is not among the formats that are enforced: {', '.join(FORMATS)}")
        if pattern is not None and not isinstance(pattern, str):
            raise self.refuse("pattern", "must be a string")
        fewest, most = RegexGrammar(self.rules, self.param).widths(pattern or FORMATS[name])
        if fewest < low or (high is not None and most > high):
            keyword = "minLength" if fewest < low else "maxLength"
            raise self.refuse(keyword, "is not supported together with a pattern or format that does not imply it")
        return choice(self._matching(form, pattern or FORMATS[name]) for form in self.notation.strings)

    def _matching(self, form: Quoted, pattern: str) -> str:
        body = RegexGrammar(self.rules, self.param, form).expression(pattern)
        return self.rules.add(form.around(body), "string")

    def _array(self, schema: dict[str, Any]) -> str:
        low, high = self.count(schema, "minItems", 0), self.count(schema, "maxItems", None)
        prefix, rest = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(rest, list):  # before 2020-12
            prefix, rest = rest, schema.get("additionalItems", True)
        if not isinstance(prefix, list):
            raise self.refuse("prefixItems", "must be a list of schemas")
        if rest is False or (prefix and "items" not in schema and "additionalItems" not in schema):
            high = len(prefix) if high is None else min(high, len(prefix))
        if high is not None and low > high:
            raise self.refuse("minItems", "no array can have so many items")
        if schema.get("uniqueItems") and (high is None or high > 1):
            raise self.refuse("uniqueItems", "is supported for arrays of at most one item only")
        blank, comma = self.blank, f'"," {self.blank}'
        found = ""
        if high is None or high > len(prefix):
            found = self._tail(self.value(rest), comma, max(0, low - len(prefix)),
                               None if high is None else high - len(prefix), bool(prefix))  # fmt: skip
        for index in range(min(len(prefix), len(prefix) if high is None else high) - 1, -1, -1):
            item = sequence(comma if index else "", self.value(prefix[index]), found)
            found = item if index < low else repeat(item, 0, 1)
        return f'"[" {blank} {sequence(found, blank)} "]"'

    def _tail(self, item: str, comma: str, low: int, high: int | None, is_behind: bool) -> str:
        """`low` to `high` items, with a comma before each if others come before."""
        if is_behind:
            return self.rules.repeat(f"{comma} {item}", low, high)
        more = self.rules.repeat(f"{comma} {item}", max(0, low - 1), None if high is None else high - 1)
        return sequence(item, more) if low else repeat(sequence(item, more), 0, 1)


def _floor(value: Decimal, is_strict: bool) -> int:
    """The smallest integer at or above `value`, above it if strict."""
    whole = -int((-value).to_integral_value(rounding="ROUND_FLOOR"))
    return whole + 1 if is_strict and whole == value else whole
