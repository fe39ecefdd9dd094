"""Counts of repetitions in regexes, grammars and schemas: one that no backend can hold is refused with its digits.

Backends count in 32 bits. Of a larger number some take what is left of it, others end in an error of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from fuseline.api.errors import ApiError, bad_request
from fuseline.api.structured.portable import VALUES

MAX_COUNT = 2**31 - 1
KEYWORDS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
MAX_SHOWN = 40
"""Digits of a number that a message shows."""
# What is skipped comes first. An open end is taken to the end of the text, so that the search is linear.
_BRACES = r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}"
_SET = r"\[(?:\\.|[^\]\\])*+\]?"
_STRING = r'"(?:\\.|[^"\\])*+"?'
IN_REGEX = re.compile(rf"\\.|{_SET}|{_BRACES}", re.DOTALL)
IN_GBNF = re.compile(rf"{_STRING}|{_SET}|#[^\n]*|{_BRACES}", re.DOTALL)
IN_LARK = re.compile(
    rf"{_STRING}|//[^\n]*|/(?P<regex>(?:\\.|[^/\\\n])++)/|~\s*(\d+)(?:\s*\.\.\s*(\d+))?|{_BRACES}", re.DOTALL
)


def check_regex_counts(pattern: str, param: str) -> None:
    """Raises ApiError 400."""
    _check(IN_REGEX, pattern, param)


def check_grammar_counts(text: str, param: str, is_lark: bool) -> None:
    """Raises ApiError 400."""
    for match in _check(IN_LARK if is_lark else IN_GBNF, text, param):
        if is_lark and match["regex"]:
            check_regex_counts(match["regex"], param)


def check_schema_counts(schema: Any, param: str) -> None:
    """All counts of a JSON schema for a package that does not name them itself. Raises ApiError 400."""
    if isinstance(schema, list):
        for item in schema:
            check_schema_counts(item, param)
    if not isinstance(schema, dict):
        return

    def refuse(keyword: str, reason: str) -> ApiError:
        return bad_request(f"{param}: {keyword}: {reason}", param, "unsupported_value")

    for keyword in KEYWORDS:
        if not isinstance(schema.get(keyword), dict):  # else it is a property of that name
            read_count(schema, keyword, None, refuse)
    if isinstance(schema.get("pattern"), str):
        check_regex_counts(schema["pattern"], param)
    for key, value in schema.items():
        if key not in VALUES:
            check_schema_counts(value, param)


def read_count(
    schema: Mapping[str, Any], keyword: str, default: int | None, refuse: Callable[[str, str], Exception]
) -> int | None:
    """The count that a keyword states. Raises what `refuse` makes of the keyword and a reason."""
    value = schema.get(keyword, default)
    if value is default:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise refuse(keyword, "must be an integer, 0 or more")
    if value > MAX_COUNT:
        raise refuse(keyword, f"{_shown(str(value))} is too large; at most {MAX_COUNT}")
    return value


def _check(pattern: re.Pattern[str], text: str, param: str) -> list[re.Match[str]]:
    """All matches. Raises ApiError 400 for one with a number above MAX_COUNT among its groups of digits."""
    found = list(pattern.finditer(text))
    for digits in (group for match in found for group in match.groups() if group and group.isdecimal()):
        if len(digits.lstrip("0")) > len(str(MAX_COUNT)) or int(digits) > MAX_COUNT:
            message = f"{param}: the repetition count {_shown(digits)} is too large; at most {MAX_COUNT}"
            raise bad_request(message, param, "unsupported_value")
    return found


def _shown(digits: str) -> str:
    return digits if len(digits) <= MAX_SHOWN else f"{digits[:MAX_SHOWN]}..."
