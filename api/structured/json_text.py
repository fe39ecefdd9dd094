"""JSON's own texts as grammar expressions: strings, their characters, constant values, whitespace."""

from __future__ import annotations

import json

from fuseline.api.structured.ebnf import Ranges, char_set, complement, literal, normalized

RAW_CHARS: Ranges = complement(normalized(((0, 31), (34, 34), (92, 92))))
"""Characters that stand for themselves in a JSON string."""
JSON_ESCAPES = {char: literal(text) for char, text in (('"', '\\"'), ("\\", "\\\\"), ("\n", "\\n"), ("\t", "\\t"))}
ANY_ESCAPE = (
    r'"\\" (["\\/bfnrt] | "u" ([0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2}))'
)
"""Every escape that is one character: no surrogates."""
CHAR = f"({char_set(RAW_CHARS)} | {ANY_ESCAPE})"
QUOTE = literal('"')
WHITESPACE = r'(" " | "\n" [ \t]{0,20})?'
"""A blank, or a new line with its indentation: no model can get lost in it."""
NO_WHITESPACE = '""'


def quoted_char(code: int) -> str:
    return literal(json.dumps(chr(code))[1:-1])


def constant(value: object) -> str:
    """A JSON value as it is, without blanks."""
    return literal(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
