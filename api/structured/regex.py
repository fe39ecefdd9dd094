"""Regexes to grammars: the whole text must match. Python's own parser reads them; what a grammar cannot say is refused.

Character classes are subsets on which Python and ECMA 262 agree: `\\d` and `\\w` are ASCII's, `\\W` too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from fuseline.api.errors import ApiError, bad_request
from fuseline.api.structured.counts import check_regex_counts
from fuseline.api.structured.ebnf import (
    EVERY_CHAR,
    FEW_TEXTS,
    Ranges,
    Rules,
    char_set,
    choice,
    complement,
    intersection,
    normalized,
    of_chars,
    one_of,
    sequence,
)
from fuseline.api.structured.notation import Quoted

DIGITS: Ranges = ((48, 57),)
WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
SPACE = of_chars(" \t\n\r\f\v")
NO_DIGITS = intersection(complement(DIGITS), ((0, 0x65F),))
"""Below the first digit that is not ASCII's."""
_SPACES = (
    (0, 32), (0x7F, 0xA0), (0x1680, 0x1680), (0x2000, 0x200F), (0x2028, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000),
    (0xFEFF, 0xFEFF),
)  # fmt: skip
NO_SPACE = complement(normalized(_SPACES))
CATEGORIES: dict[Any, Ranges] = {
    codes.CATEGORY_DIGIT: DIGITS,
    codes.CATEGORY_NOT_DIGIT: NO_DIGITS,
    codes.CATEGORY_WORD: WORD,
    codes.CATEGORY_NOT_WORD: intersection(complement(WORD), ((0, 127),)),
    codes.CATEGORY_SPACE: SPACE,
    codes.CATEGORY_NOT_SPACE: NO_SPACE,
}
NEGATED: dict[Any, Ranges] = {
    codes.CATEGORY_DIGIT: NO_DIGITS,
    codes.CATEGORY_NOT_DIGIT: DIGITS,
    codes.CATEGORY_WORD: CATEGORIES[codes.CATEGORY_NOT_WORD],
    codes.CATEGORY_NOT_WORD: WORD,
    codes.CATEGORY_SPACE: NO_SPACE,
    codes.CATEGORY_NOT_SPACE: SPACE,
}
ANY = complement(of_chars("\n\r\u2028\u2029"))
WORDS = {
    codes.GROUPREF: "a back reference",
    codes.GROUPREF_EXISTS: "a conditional group",
    codes.ASSERT: "a lookahead or lookbehind",
    codes.ASSERT_NOT: "a negative lookahead or lookbehind",
    codes.ATOMIC_GROUP: "an atomic group",
    codes.POSSESSIVE_REPEAT: "a possessive quantifier",
}
BEGINS = {codes.AT_BEGINNING, codes.AT_BEGINNING_STRING}
ENDS = {codes.AT_END, codes.AT_END_STRING}


class RegexGrammar:
    """`param` names the field in errors; `within`: the string in which the text stands, whose escapes it takes."""

    def __init__(self, rules: Rules, param: str, within: Quoted | None = None) -> None:
        self._rules = rules
        self._param = param
        self._within = within
        self._dot = ANY

    def expression(self, pattern: str) -> str:
        """Raises ApiError 400."""
        parsed = self._parse(pattern)
        self._dot = EVERY_CHAR if parsed.state.flags & re.DOTALL else ANY
        return self._items(list(parsed), True, True)

    def widths(self, pattern: str) -> tuple[int, int]:
        """Fewest and most characters of a match."""
        low, high = self._parse(pattern).getwidth()
        return low, high

    def _parse(self, pattern: str) -> Any:
        check_regex_counts(pattern, self._param)
        try:
            parsed = parser.parse(re.sub(r"\(\?<(?=[A-Za-z_])", "(?P<", pattern))
        except (re.error, OverflowError, RecursionError, ValueError) as error:
            raise self._refuse(f"the regex cannot be read: {error}") from error
        if parsed.state.flags & (re.IGNORECASE | re.MULTILINE | re.LOCALE):
            raise self._refuse("the regex has a flag that a grammar cannot follow")
        return parsed

    def _refuse(self, message: str) -> ApiError:
        return bad_request(f"{self._param}: {message}", self._param)

    def _items(self, items: list[tuple[Any, Any]], is_first: bool, is_last: bool) -> str:
        """`is_first`, `is_last`: nothing comes before, or behind, so that an anchor there says nothing."""
        texts = [index for index, (code, _) in enumerate(items) if code != codes.AT]
        begin, end = (texts[0], texts[-1]) if texts else (len(items), -1)
        return sequence(*(
            self._item(code, value, is_first and index <= begin, is_last and index >= end)
            for index, (code, value) in enumerate(items)
        ))  # fmt: skip

    def _item(self, code: Any, value: Any, is_first: bool, is_last: bool) -> str:
        if code in (codes.LITERAL, codes.NOT_LITERAL):
            ranges: Ranges = ((value, value),)
            return self._set(ranges if code == codes.LITERAL else complement(ranges))
        if code == codes.ANY:
            return self._set(self._dot)
        if code == codes.IN:
            return self._set(self._class(value))
        if code == codes.BRANCH:
            if texts := self._texts(value[1]):
                return one_of(self._rules, texts)
            return choice(self._items(list(branch), is_first, is_last) for branch in value[1])
        if code == codes.SUBPATTERN:
            _, added, removed, inner = value
            if added or removed:
                raise self._refuse("the regex has a flag within a group")
            return f"({self._items(list(inner), is_first, is_last)})"
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            fewest, most, inner = value
            body = self._items(list(inner), False, False)
            return self._rules.repeat(body, int(fewest), None if most == codes.MAXREPEAT else int(most))
        if code == codes.AT and ((value in BEGINS and is_first) or (value in ENDS and is_last)):
            return ""
        what = WORDS.get(code, "an anchor or word border within the text")
        raise self._refuse(f"the regex has {what}, which a grammar cannot follow")

    def _texts(self, branches: Sequence[Any]) -> list[str]:
        """What many alternatives say that are all plain text, as it is written; none for others."""
        if len(branches) <= FEW_TEXTS or any(code != codes.LITERAL for branch in branches for code, _ in branch):
            return []
        texts = ["".join(chr(value) for _, value in branch) for branch in branches]
        is_same = self._within is None or all(self._within.escaped(char) == char for char in set("".join(texts)))
        return texts if is_same else []

    def _class(self, items: list[tuple[Any, Any]]) -> Ranges:
        is_negated = items[0][0] == codes.NEGATE
        if not is_negated:
            return normalized(part for item in items for part in self._class_item(*item))
        found = EVERY_CHAR
        for code, value in items[1:]:
            if code == codes.CATEGORY:
                found = intersection(found, NEGATED[value])
            else:
                found = intersection(found, complement(self._class_item(code, value)))
        return found

    def _class_item(self, code: Any, value: Any) -> Ranges:
        if code == codes.LITERAL:
            return ((value, value),)
        return (value,) if code == codes.RANGE else CATEGORIES[value]

    def _set(self, ranges: Ranges) -> str:
        found = intersection(ranges, EVERY_CHAR)
        if not found:
            raise self._refuse("the regex has a set without any character")
        if self._within is None:
            return char_set(found)
        made = self._within.characters(found)
        if made is None:
            raise self._refuse("the regex has a character that the format of this model cannot write")
        return made
