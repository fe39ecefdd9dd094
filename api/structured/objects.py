"""Objects: properties in their order, required or not, additional ones behind them, within bounds of their number."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fuseline.api.structured.ebnf import Ranges, char_set, choice, complement, intersection, literal, of_chars, sequence
from fuseline.api.structured.merge import Conflict, merge
from fuseline.api.structured.notation import LETTERS, WORD

if TYPE_CHECKING:
    from fuseline.api.structured.schema import SchemaGrammar

MAX_STATES = 20_000
"""Properties times counted ones: rules of one object."""


class ObjectGrammar:
    def __init__(self, grammar: SchemaGrammar) -> None:
        self._grammar = grammar

    def expression(self, schema: dict[str, Any]) -> str:
        """Raises ApiError 400."""
        grammar = self._grammar
        properties, required = self._properties(schema)
        low, high = grammar.count(schema, "minProperties", 0), grammar.count(schema, "maxProperties", None)
        pair = self._other_pair(schema, set(properties))
        most = len(properties) if pair is None else None
        if pair is not None and low > max(1, len(required)) and low > len(required) + 1:
            reason = "beside additional properties it can be at most one more than the required ones"
            raise grammar.refuse("minProperties", reason)
        high = most if high is None else high if most is None else min(high, most)
        if high is not None and (low > high or len(required) > high):
            raise grammar.refuse("minProperties", "no object can have so many properties and so few")
        has_bounds = low > len(required) or (high is not None and (most is None or high < most))
        if (len(properties) + 1) * ((high or low) + 1 if has_bounds else 2) > MAX_STATES:
            raise grammar.refuse("maxProperties", "is too large for an object with so many properties")
        chain = _Chain(grammar, properties, required, pair, (low, high) if has_bounds else None)
        opens, closes = grammar.notation.opens, grammar.notation.closes
        return f'"{opens}" {grammar.blank} {sequence(chain.start(), grammar.blank)} "{closes}"'

    def any_key(self) -> str:
        """The name of any property."""
        return self._other_key(set())

    def _properties(self, schema: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """Properties that may be there, and the names of those that must be."""
        refuse = self._grammar.refuse
        properties, required = dict(schema.get("properties", {})), schema.get("required", [])
        if not isinstance(schema.get("properties", {}), dict):
            raise refuse("properties", "must be an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise refuse("required", "must be a list of names")
        other = schema.get("additionalProperties", schema.get("unevaluatedProperties", True))
        missing = [name for name in required if name not in properties]
        if missing and "patternProperties" in schema:
            raise refuse("required", f"{missing[0]!r} must be among the properties beside patternProperties")
        properties |= {name: other for name in missing}
        for name in required:
            if properties[name] is False:
                raise refuse("required", f"{name!r} can have no value")
        if "propertyNames" in schema and properties:
            raise refuse("propertyNames", "is not supported beside named properties")
        if self._grammar.notation.keys != "strings":
            for keyword in ("propertyNames", "patternProperties"):
                if keyword in schema:
                    raise refuse(keyword, "is not supported in the format of this model")
        return {name: value for name, value in properties.items() if value is not False}, set(required)

    def _other_pair(self, schema: dict[str, Any], names: set[str]) -> str | None:
        """Expression of a property that is not named; None if there may be none."""
        grammar = self._grammar
        other = schema.get("additionalProperties", schema.get("unevaluatedProperties"))
        patterns = schema.get("patternProperties")
        if patterns is not None:
            return self._pattern_pair(schema, patterns, other)
        if other is None:  # like strict schemas: what is named, unless nothing is
            other = "properties" not in schema or None
        if other in (None, False):
            return None
        if grammar.notation.keys == "identifiers" and (names or other is not True):
            reason = "the format of this model takes arguments that are named"
            raise grammar.refuse("additionalProperties", reason)
        key_schema = schema.get("propertyNames", True)
        if key_schema is True:
            key = self._other_key({name for name in {*names, *schema.get("properties", {})}})
        else:
            key = grammar.value(self._string_schema(key_schema))
        return f'{key} "{grammar.notation.colon}" {grammar.blank} {grammar.inner.value(other)}'

    def _pattern_pair(self, schema: dict[str, Any], patterns: Any, other: Any) -> str | None:
        refuse = self._grammar.refuse
        if not isinstance(patterns, dict) or len(patterns) != 1:
            raise refuse("patternProperties", "one pattern is supported")
        if schema.get("properties") or "propertyNames" in schema:
            raise refuse("patternProperties", "is not supported beside properties or propertyNames")
        if other not in (None, False):
            raise refuse("patternProperties", "is not supported together with additionalProperties other than false")
        ((pattern, value),) = patterns.items()
        if value is False:
            return None
        key = self._grammar.value({"type": "string", "pattern": pattern})
        return f'{key} "{self._grammar.notation.colon}" {self._grammar.blank} {self._grammar.inner.value(value)}'

    def _string_schema(self, key_schema: Any) -> Any:
        try:
            return merge({"type": "string"}, self._grammar.resolved(key_schema))
        except Conflict as conflict:
            raise self._grammar.refuse("propertyNames", "must allow strings") from conflict

    def _other_key(self, names: set[str]) -> str:
        """A key that is none of the names, written without escapes unless there are no names."""
        rules, form = self._grammar.rules, self._grammar.notation.strings[0]
        if self._grammar.notation.keys != "strings":
            return self._not_in(names | {""}, _Key(LETTERS, WORD, "{0,63}", ""))
        if not names:
            return self._grammar.any_string()
        rest = self._not_in(names, _Key(form.raw, form.raw, "*", form.end))
        return rules.add(sequence(literal(form.begin), rest), "key")

    def _not_in(self, names: set[str], key: _Key) -> str:
        """The rest of a key, and its end, which is none of `names`."""
        rules = self._grammar.rules
        rest = sequence(f"{char_set(key.chars)}{key.count}", literal(key.end) if key.end else "")
        if not names:
            return rules.add(rest, "rest")
        by_char: dict[str, set[str]] = {}
        for name in names - {""}:
            by_char.setdefault(name[0], set()).add(name[1:])
        others = intersection(key.first, complement(of_chars(sorted(by_char))))
        parts = [] if "" in names else [literal(key.end)]
        parts.append(f"{char_set(others)} {rest}")
        behind = replace(key, first=key.chars)
        for char in sorted(by_char):
            code = ord(char)
            if any(low <= code <= high for low, high in key.first):
                parts.append(f"{char_set(((code, code),))} {self._not_in(by_char[char], behind)}")
        return rules.add(choice(parts), "key")


@dataclass(frozen=True)
class _Key:
    """How a key that no schema names may look: its first character, the others and their count, its end."""

    first: Ranges
    chars: Ranges
    count: str
    end: str


class _Chain:
    """Rules for what may come from the i-th property on, given how many have been before."""

    def __init__(
        self,
        grammar: SchemaGrammar,
        properties: dict[str, Any],
        required: set[str],
        pair: str | None,
        bounds: tuple[int, int | None] | None,
    ) -> None:
        self._grammar = grammar
        self._names = list(properties)
        self._properties = properties
        self._required = required
        self._pair = pair
        self._bounds = bounds
        self._num_required = [sum(name in required for name in self._names[i:]) for i in range(len(self._names) + 1)]
        self._rules: list[dict[int, str | None]] = [{} for _ in range(len(self._names) + 1)]

    def start(self) -> str:
        """From the end, so that no recursion is as deep as an object is long."""
        low, high = self._bounds or (0, None)
        counts = range((high if high is not None else low) + 1) if self._bounds else range(2)
        for index in range(len(self._names), -1, -1):
            for count in counts:
                self._rules[index][count] = self._rule(index, count)
        return self._rules[0][0] or '""'

    def _next(self, count: int) -> int:
        if self._bounds is None:
            return 1
        low, high = self._bounds
        return count + 1 if high is not None else min(low, count + 1)

    def _rule(self, index: int, count: int) -> str | None:
        """Name of the rule; None if nothing valid can follow."""
        comma = f'"," {self._grammar.blank}' if count else ""
        if index == len(self._names):
            return self._end(count, comma)
        name = self._names[index]
        after, without = self._rules[index + 1].get(self._next(count)), self._rules[index + 1].get(count)
        parts = []
        if after is not None:
            value = self._grammar.inner.value(self._properties[name])
            parts.append(sequence(comma, self._key(name), self._grammar.blank, value, after))
        if name not in self._required and without is not None:
            parts.append(without)
        return self._grammar.rules.add(choice(parts), "o") if parts else None

    def _key(self, name: str) -> str:
        notation = self._grammar.notation
        texts = notation.keys_of(name)
        if not texts:
            raise self._grammar.refuse("properties", f"{name[:50]!r} cannot be written in the format of this model")
        return sequence(choice(map(literal, texts)), f'"{notation.colon}"')

    def _end(self, count: int, comma: str) -> str | None:
        low, high = self._bounds or (0, None)
        add = self._grammar.rules.add
        if self._pair is None:
            return add('""', "o") if count >= low else None
        more = f'("," {self._grammar.blank} {self._pair})'
        fewest, most = max(0, low - count), None if high is None else high - count
        if most == 0:
            return add('""', "o") if fewest == 0 else None
        rest = f"{more}*" if most is None else f"{more}{{0,{most - 1}}}"
        found = f"{sequence(comma, self._pair)} {rest}"
        return add(found if fewest else f"({found})?", "o")
