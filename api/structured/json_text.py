"""JSON's own texts as grammar expressions: strings, their characters, constant values, whitespace."""

from __future__ import annotations

import json

from fuseline.api.structured.ebnf import Ranges, Rules, char_set, complement, literal, normalized

RAW_CHARS: Ranges = complement(normalized(((0, 31), (34, 34), (92, 92))))
"""Characters that stand for themselves in a JSON string."""
JSON_ESCAPES = {char: literal(text) for char, text in (('"', '\\"'), ("\\", "\\\\"), ("\n", "\\n"), ("\t", "\\t"))}
ANY_ESCAPE = (
    r'"\\" (["\\/bfnrt] | "u" ([0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2}))'
)
"""Every escape that is one character: no surrogates."""
RAW = char_set(RAW_CHARS)
QUOTE = literal('"')
WHITESPACE = r'(" " | "\n" [ \t]{0,20})?'
"""A blank, or a new line with its indentation: no model can get lost in it."""
NO_WHITESPACE = '""'


def any_string(rules: Rules) -> str:
    """Name of the rule for strings of any length.

    One rule goes to the closing quote: xgrammar knows beforehand which tokens may come in a rule, so that masks in a
    string cost next to nothing.
    """
    rest = rules.reserve("rest")
    rules.define(rest, f"{QUOTE} | {RAW} {rest} | {ANY_ESCAPE} {rest}")
    return rules.add(f"{QUOTE} {rest}", "string")


def quoted_char(code: int) -> str:
    return literal(json.dumps(chr(code))[1:-1])


def constant(value: object) -> str:
    """A JSON value as it is, without blanks."""
    return literal(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
