"""How values are spelled: as JSON, and as models write the arguments of calls in formats of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fuseline.api.structured.ebnf import (
    Ranges,
    Rules,
    char_set,
    choice,
    complement,
    intersection,
    literal,
    of_chars,
    one_of,
    sequence,
    text_until,
)
from fuseline.api.structured.json_text import RAW_CHARS

LETTERS: Ranges = ((65, 90), (95, 95), (97, 122))
WORD: Ranges = ((48, 57), *LETTERS)
MAX_NAME = 128
"""Characters of a key without quotes."""
CODE = '"u" ([0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2})'
"""An escape of one character: no surrogates."""
LINE = r'"\n"?'
BLANK = r"[ \n]{0,3}"
"""Between the parts of a call."""


@dataclass(frozen=True)
class Quoted:
    """One way in which strings are written: characters between two marks."""

    begin: str
    end: str
    raw: Ranges = RAW_CHARS
    """Characters that stand for themselves."""
    has_escapes: bool = True
    """Others are written with a backslash, as in JSON; else a string may be any text without `end`."""
    apart: str = ""
    """Two characters that never stand side by side; the first of them is not in `raw`."""
    is_line: bool = False
    """A line break on either side does not belong to the string."""

    def around(self, body: str) -> str:
        line = LINE if self.is_line else ""
        return sequence(literal(self.begin) if self.begin else "", line, body, line, literal(self.end))

    def any_string(self, rules: Rules) -> str:
        """Name of the rule for strings of any length.

        One rule goes to the closing mark: xgrammar knows beforehand which tokens may come in a rule, so that masks in a
        string cost next to nothing.
        """
        if not self.has_escapes:
            return rules.add(sequence(literal(self.begin) if self.begin else "", text_until(rules, self.end)), "text")
        rest = rules.reserve("rest")
        quotes = '"' if self.end == '"' else f'"{self.end}'
        escape = rf'"\\" ([{quotes}\\/bfnrt] | {CODE})'
        found = f"{literal(self.end)} | {char_set(self.raw)} {rest} | {escape} {rest}"
        rules.define(rest, found + (f" | {self._apart(rules, rest, escape)}" if self.apart else ""))
        return rules.add(f"{literal(self.begin)} {rest}", "string")

    def characters(self, ranges: Ranges) -> str | None:
        """One of these characters; None where none can be written."""
        raw = intersection(ranges, self.raw)
        parts = [char_set(raw)] if raw else []
        if self.has_escapes:
            known = (self.end, "\\", "\n", "\t", *self.apart[:1])
            parts += [literal(self.escaped(char)) for char in known if any(a <= ord(char) <= b for a, b in ranges)]
            if not parts:
                codes = [code for low, high in ranges for code in range(low, high + 1)]
                parts = [literal(self.escaped(chr(code))) for code in codes]
        return choice(parts) if parts else None

    def text(self, value: str) -> str | None:
        """A string of this value, of a line without what is around it; None where it cannot be written."""
        if self.has_escapes:
            return self.begin + "".join(map(self.escaped, value)) + self.end
        is_whole = (value + self.end).find(self.end) == len(value)
        keeps_lines = not self.is_line or value == value.strip("\n")
        if not (is_whole and keeps_lines):
            return None
        return value if self.is_line else self.begin + value + self.end

    def escaped(self, char: str) -> str:
        if any(low <= ord(char) <= high for low, high in self.raw):
            return char
        found = "\\" + char if char == self.end else json.dumps(char)[1:-1]
        return f"\\u{ord(char):04x}" if found == char else found

    def _apart(self, rules: Rules, rest: str, escape: str) -> str:
        """The first of the characters that never stand side by side, and what may follow it."""
        first, second = self.apart
        others = char_set(intersection(self.raw, complement(of_chars(second))))
        after = rules.reserve("after")
        end = literal(self.end)
        rules.define(after, f"{end} | {others} {rest} | {escape} {rest} | {literal(first)} {after}")
        return f"{literal(first)} {after}"


@dataclass(frozen=True)
class Notation:
    """How values are spelled. Numbers and lists are JSON's in each."""

    strings: tuple[Quoted, ...]
    """Ways to write a string, one as good as the others; keys are written in the first."""
    words: tuple[str, str, str] = ("true", "false", "null")
    opens: str = "{"
    closes: str = "}"
    colon: str = ":"
    """Between a key and its value."""
    keys: Literal["strings", "words", "identifiers"] = "strings"
    """Words are strings only where they have other characters; identifiers are Python's."""
    inner: Notation | None = None
    """The notation of values within objects, if it is another one."""

    def texts(self, value: Any) -> list[str]:
        """Ways to write a value; none where it cannot be written."""
        return [text for form in self.strings for text in [self._text(value, form)] if text is not None]

    def constants(self, rules: Rules, texts: Iterable[str]) -> str:
        """One of what `texts` has given."""
        found = one_of(rules, texts)
        return self.strings[0].around(found) if self.strings[0].is_line else found

    def keys_of(self, name: str) -> list[str]:
        """Ways to write a key."""
        if self.keys == "strings":
            return self.texts(name)
        text = self._key_text(name, self.strings[0])
        return [] if text is None else [text]

    def _text(self, value: Any, form: Quoted) -> str | None:
        if isinstance(value, bool) or value is None:
            return self.words[(True, False, None).index(value)]
        if isinstance(value, str):
            return form.text(value)
        within = self.inner or self
        if isinstance(value, list):
            parts = [self._text(item, form) for item in value]
            return None if None in parts else f"[{','.join(parts)}]"
        if isinstance(value, dict):
            pairs = [(self._key_text(key, form), within._text(item, form)) for key, item in value.items()]
            is_whole = all(text is not None for pair in pairs for text in pair)
            return self.opens + ",".join(map(self.colon.join, pairs)) + self.closes if is_whole else None
        return json.dumps(value)

    def _key_text(self, name: str, form: Quoted) -> str | None:
        if self.keys == "strings":
            return form.text(name)
        if len(name) > MAX_NAME or name != name.strip():
            return None
        is_word = name.isidentifier() if self.keys == "identifiers" else re.fullmatch(r"\w[\w.\-$]*", name)
        return name if is_word else form.text(name) if self.keys == "words" else None


JSON = Notation((Quoted('"', '"'),))
PYTHON = Notation(
    (Quoted('"', '"'), Quoted("'", "'", intersection(complement(of_chars("'\\")), complement(((0, 31),))))),
    words=("True", "False", "None"),
)
PYTHON_CALL = Notation(PYTHON.strings, PYTHON.words, "(", ")", "=", "identifiers", inner=PYTHON)
"""Keyword arguments."""


def json_within(end: str) -> Notation:
    """JSON in which `end`, of at least two characters, never stands."""
    raw = intersection(RAW_CHARS, complement(of_chars(end[0])))
    return Notation((Quoted('"', '"', raw, apart=end[:2]),))


def lines_before(end: str) -> Notation:
    """Strings as they are, up to `end`, with or without a line break on either side."""
    raw = complement(of_chars(sorted({end[0], "\n"})))
    return Notation((Quoted("", end, raw, has_escapes=False, is_line=True),))


def marked(quote: str) -> Notation:
    """Objects with bare keys, and strings as they are between marks."""
    raw = complement(of_chars(quote[0]))
    return Notation((Quoted(quote, quote, raw, has_escapes=False),), keys="words")
