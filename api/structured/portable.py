"""Regexes in the syntax that the packages of all backends read alike."""

from __future__ import annotations

import re
from typing import Any

CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "s": r" \t\n\r\f\v"}
"""As in JSON schemas (ECMA 262): packages differ in what else of Unicode is a digit or a letter."""
NOT_CLASSES = {"D": r"[\x00-/:-\x7f]", "W": r"[\x00-/:-@\[-\^`{-\x7f]", "S": r"[!-~]"}
"""ASCII alone: in it, all agree."""
VALUES = ("const", "enum", "default", "examples")
"""Keywords whose values hold no schemas."""


def portable_regex(pattern: str) -> str:
    """The regex of the same whole texts, or of fewer, without anchors around it."""
    pattern = pattern.removeprefix("^")
    pattern = pattern if pattern.endswith("\\$") else pattern.removesuffix("$")
    return with_ascii_classes(pattern)


def with_ascii_classes(pattern: str) -> str:
    parts, is_in_set = [], False
    for part in re.findall(r"\\.|.|\n", pattern, re.DOTALL):
        name = part[1:] if part[0] == "\\" else ""
        if name in CLASSES:
            parts.append(CLASSES[name] if is_in_set else f"[{CLASSES[name]}]")
        elif name in NOT_CLASSES and not is_in_set:
            parts.append(NOT_CLASSES[name])
        else:
            is_in_set = part == "[" or (is_in_set and part != "]")
            parts.append(part)
    return "".join(parts)


def quoted_regex(text: str) -> str:
    """The regex of one text."""
    return re.sub(r"[\\^$.|?*+()\[\]{}]", r"\\\g<0>", text)


def portable_patterns(schema: Any, is_whole: bool) -> Any:
    """The schema with each `pattern` in the common syntax; `is_whole`: as one of whole strings, in brackets."""
    if isinstance(schema, list):
        return [portable_patterns(item, is_whole) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: value if key in VALUES else portable_patterns(value, is_whole) for key, value in schema.items()}
    if isinstance(found.get("pattern"), str):
        pattern = found["pattern"]
        found["pattern"] = f"^({portable_regex(pattern)})$" if is_whole else with_ascii_classes(pattern)
    return found
