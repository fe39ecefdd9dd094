"""Whether no value can be valid under two schemas: oneOf is enforced only where that is certain."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from fuseline.api.structured.interned import Interned
from fuseline.api.structured.keywords import TYPES

Resolve = Callable[[Any], dict[str, Any]]
MAX_DEPTH = 8


class Disjoint:
    """Remembers what it has found of each pair of schemas. `resolve` takes $ref and allOf away."""

    def __init__(self, resolve: Resolve, interned: Interned) -> None:
        self._resolve, self._interned = resolve, interned
        self._found: dict[tuple[int, int, int], bool] = {}

    def holds(self, a: dict[str, Any], b: dict[str, Any], depth: int = 0) -> bool:
        """False also where it cannot be told."""
        if depth > MAX_DEPTH:
            return False
        key = (self._interned.number(a), self._interned.number(b), depth)
        if key not in self._found:
            self._found[key] = self._are_disjoint(a, b, depth)
        return self._found[key]

    def _are_disjoint(self, a: dict[str, Any], b: dict[str, Any], depth: int) -> bool:
        for one, other in ((a, b), (b, a)):
            for keyword in ("anyOf", "oneOf"):
                if isinstance(one.get(keyword), list):
                    branches = [branch for branch in one[keyword] if branch is not False]
                    return all(self.holds(self._resolve(branch), other, depth + 1) for branch in branches)
        ours, theirs = _values(a), _values(b)
        if ours is not None and theirs is not None:
            return ours.isdisjoint(theirs)
        if _kinds(a).isdisjoint(_kinds(b)):
            return True
        return _is_below(a, b) or _is_below(b, a) or self._differ_in_property(a, b, depth)

    def _differ_in_property(self, a: dict[str, Any], b: dict[str, Any], depth: int) -> bool:
        """Objects with a required property whose values differ."""
        if _kinds(a) & _kinds(b) != {"object"}:
            return False
        ours, theirs = a.get("properties", {}), b.get("properties", {})
        required = [name for name in a.get("required", ()) if name in b.get("required", ())]
        common = [name for name in required if name in ours and name in theirs]
        return any(self.holds(self._resolve(ours[name]), self._resolve(theirs[name]), depth + 1) for name in common)


def _values(schema: dict[str, Any]) -> set[str] | None:
    """The constants that a schema allows, in one spelling; None if it has no list of them."""
    found = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(found, list):
        return None
    return {json.dumps(_one_spelling(value), sort_keys=True) for value in found}


def _one_spelling(value: Any) -> Any:
    """A number as a float, as far as there are any so large."""
    return float(value) if TYPES["number"](value) and abs(value) <= sys.float_info.max else value


def _kinds(schema: dict[str, Any]) -> set[str]:
    """Types of the values; "number" includes integers."""
    constants = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(constants, list):
        return {kind for kind, has in TYPES.items() if kind != "integer" and any(map(has, constants))}
    given = schema.get("type", list(TYPES))
    kinds = {given} if isinstance(given, str) else set(given)
    return {"number" if kind == "integer" else kind for kind in kinds}


def _is_below(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Numbers of which all of a's are smaller."""
    if _kinds(a) & _kinds(b) != {"number"}:
        return False
    highs = [(a[key], key == "exclusiveMaximum") for key in ("maximum", "exclusiveMaximum") if key in a]
    lows = [(b[key], key == "exclusiveMinimum") for key in ("minimum", "exclusiveMinimum") if key in b]
    return any(high < low or (high == low and (x or y)) for high, x in highs for low, y in lows)
