"""A request's body as a JSON object: strict, so that no route meets what JSON or a 64-bit machine cannot hold."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import msgspec

from fuseline.api.errors import bad_request, field_path

LOWEST, BEYOND = -(2**63), 2**64
"""Numbers outside of [LOWEST, BEYOND) fit neither int64 nor uint64."""
MANY_DIGITS = re.compile(rb"\d{19}")


def parse_object(raw: bytes) -> dict[str, Any]:
    """Raises ApiError 400, which names the field of NaN, Infinity, numbers too large and half surrogate pairs."""
    try:
        fields, is_suspect = msgspec.json.decode(raw), MANY_DIGITS.search(raw) is not None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        fields, is_suspect = _parse_leniently(raw), True
    except RecursionError as error:
        raise bad_request("the body is nested too deeply") from error
    if not isinstance(fields, dict):
        raise bad_request("the body must be a JSON object")
    if is_suspect:
        _check_values(fields)
    return fields


def _parse_leniently(raw: bytes) -> Any:
    """Python's parser says what is wrong in words, and lets those values through that can be named afterwards."""
    try:
        return json.loads(raw, parse_int=_whole)
    except RecursionError as error:
        raise bad_request("the body is nested too deeply") from error
    except ValueError as error:
        raise bad_request(f"the body is no valid JSON: {error}") from error


def _whole(digits: str) -> int:
    """Python refuses to convert more than 4300 digits; any number as large does instead."""
    return int(digits) if len(digits) < 100 else BEYOND


def _check_values(fields: dict[str, Any]) -> None:
    open_values: list[tuple[tuple[str | int, ...], dict[str, Any] | list[Any]]] = [((), fields)]
    while open_values:
        path, container = open_values.pop()
        if isinstance(container, dict):
            for key in container:
                _text(key, path)
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, dict | list):
                open_values.append(((*path, key), value))
            elif isinstance(value, str):
                _text(value, (*path, key))
            elif isinstance(value, float) and not math.isfinite(value):
                raise _refusal((*path, key), "must be a finite number")
            elif isinstance(value, int) and not LOWEST <= value < BEYOND:
                raise _refusal((*path, key), "is a number beyond 64 bits")


def _text(value: str, path: tuple[str | int, ...]) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _refusal(path, "holds half of a surrogate pair, which is no text") from error
    return value


def _refusal(path: tuple[str | int, ...], words: str) -> Exception:
    where = field_path(path)
    return bad_request(f"{where or 'the body'}: {words}", where or None)
