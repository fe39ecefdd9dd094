"""JSON's own texts as grammar expressions: the characters of strings, whitespace."""

from __future__ import annotations

from fuseline.api.structured.ebnf import Ranges, char_set, complement, normalized

RAW_CHARS: Ranges = complement(normalized(((0, 31), (34, 34), (92, 92))))
"""Characters that stand for themselves in a JSON string."""
RAW = char_set(RAW_CHARS)
WHITESPACE = r'(" " | "\n" [ \t]{0,20})?'
"""A blank, or a new line with its indentation: no model can get lost in it."""
NO_WHITESPACE = '""'
