"""Values made up from the types of a client library: those a field takes, and some that it does not."""

from __future__ import annotations

import types
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, Required, Union, get_args, get_origin

from typing_extensions import get_type_hints, is_typeddict

MOST = 40
"""Values of one type."""
SAMPLES: dict[Any, Any] = {str: "x", int: 1, float: 0.5, bool: True, object: "x", Any: "x", type(None): None}
WRONG: tuple[Any, ...] = ({"zz": [1]}, [[{"zz": 1}]], "zz!", 3.5)


def valid(hint: Any, depth: int = 4) -> Iterator[Any]:
    """Values of the type: each choice, each kind of a union, each key of an object once."""
    yield from islice(_valid(hint, depth), MOST)


def _valid(hint: Any, depth: int) -> Iterator[Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if hint in SAMPLES:
        yield SAMPLES[hint]
    elif origin is Literal:
        yield from inner
    elif origin in (Union, types.UnionType):
        for part in inner:
            yield from valid(part, depth)
    elif is_typeddict(hint):
        yield from _objects(hint, depth)
    elif origin is dict:
        yield {"a": next(valid(inner[1], depth - 1), "x")}
    elif inner:  # a list of some kind
        for item in valid(inner[0], depth - 1) if depth else ():
            yield [item]
    else:
        raise TypeError(f"no values of {hint} are known")


def _objects(kind: Any, depth: int) -> Iterator[dict[str, Any]]:
    hints, needed = keys(kind)
    base = {name: next(valid(hints[name], depth - 1), None) for name in hints if name in needed}
    yield base
    if depth:
        for name, hint in hints.items():
            yield from ({**base, name: value} for value in valid(hint, depth - 1))


def keys(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """(types of an object's keys, keys that it must have)."""
    marked = get_type_hints(kind, include_extras=True)
    needed = {name for name, hint in marked.items() if get_origin(hint) is Required}
    return get_type_hints(kind), needed


def wrong(hint: Any, depth: int = 3) -> Iterator[Any]:
    """Values that are not of the type, and objects of the type with one wrong value inside, or without a key."""
    found = [*WRONG, *(islice(_wrong_inside(hint, depth), MOST) if depth else ())]
    yield from (value for value in found if not fits(hint, value))


def _wrong_inside(hint: Any, depth: int) -> Iterator[Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for part in inner:
            yield from _wrong_inside(part, depth)
    elif is_typeddict(hint):
        hints, needed = keys(hint)
        base = {name: next(valid(hints[name], depth - 1), None) for name in hints if name in needed}
        for name in hints:
            yield from ({**base, name: value} for value in wrong(hints[name], depth - 1))
        yield from ({key: value for key, value in base.items() if key != name} for name in needed)
    elif inner and origin not in (dict, Literal):
        yield from ([value] for value in wrong(inner[0], depth - 1))


def fits(hint: Any, value: Any) -> bool:
    """Whether a value is of the type. A tag of one value may be missing; an empty object asks for nothing."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (object, Any) or value == {}:
        return True
    if hint in SAMPLES:
        return isinstance(value, (int, float) if hint is float else hint) and (hint is bool or value is not True)
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(fits(part, value) for part in inner)
    if origin is dict:
        return isinstance(value, dict) and all(fits(inner[1], item) for item in value.values())
    if is_typeddict(hint):
        return isinstance(value, dict) and _fits_keys(hint, value)
    return bool(inner) and isinstance(value, list) and all(fits(inner[0], item) for item in value)


def _fits_keys(kind: Any, value: dict[str, Any]) -> bool:
    hints, needed = keys(kind)
    missing = [name for name in needed if name not in value]
    can_miss = all(fits(hints[name], None) or len(get_args(hints[name])) == 1 for name in missing)
    return can_miss and all(fits(hints[name], item) for name, item in value.items() if name in hints)
