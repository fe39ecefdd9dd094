"""Pieces of grammars in EBNF (GBNF): literals, character sets, and rules that are kept once however often used.

An expression is text that may stand in brackets anywhere in a rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os.path import commonprefix

from fuseline.api.errors import ApiError, bad_request

Ranges = tuple[tuple[int, int], ...]
"""Code points as ascending ranges, both ends included."""
MAX_CODE = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
EVERY_CHAR: Ranges = ((0, SURROGATES[0] - 1), (SURROGATES[1] + 1, MAX_CODE))
MAX_BYTES = 2**20
"""Longest grammar that is made of a schema or a regex."""
BLOCK = 32
"""Repetitions that are counted one by one. xgrammar computes the masks within a longer count token by token of the
vocabulary, in each step anew; blocks of blocks have masks that are computed once."""
FEW_TEXTS = 64
"""Texts that are written side by side."""
MAX_DEPTH = 64
"""Of the tree of more texts."""
_UTF8_BORDERS = (0x80, 0x800, 0x1000, 0xD000, 0xE000, 0x10000, 0x40000, 0x100000)
"""Where the first byte of a character, or what may follow it, changes: no range of a set goes across."""


class Rules:
    """The rules of one grammar. Equal bodies share a rule."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._bodies: dict[str, str] = {}
        self._size = 0

    def add(self, body: str, hint: str = "r") -> str:
        """Name of the rule with this body."""
        if body not in self._names:
            self.define(self.reserve(hint), body)
        return self._names[body]

    def reserve(self, hint: str) -> str:
        """A name for a rule that is defined later: it may refer to itself."""
        name = f"{hint}-{len(self._bodies)}"
        self._bodies[name] = ""
        return name

    def define(self, name: str, body: str) -> None:
        self._bodies[name] = body
        self._names.setdefault(body, name)
        self._size += len(body)
        if self._size > MAX_BYTES:
            raise too_large()

    def repeat(self, expression: str, fewest: int, most: int | None) -> str:
        """Like `repeat`, for counts of any size."""
        if max(fewest, most or 0) <= BLOCK:
            return repeat(expression, fewest, most)
        one = self.add(expression, "one")
        rest = repeat(one, 0, None) if most is None else self._up_to(one, most - fewest)
        return sequence(self._times(one, fewest), rest)

    def _times(self, one: str, count: int) -> str:
        if count <= BLOCK:
            return repeat(one, count, count)
        blocks, rest = divmod(count, BLOCK)
        return sequence(self._times(self._block(one), blocks), repeat(one, rest, rest))

    def _up_to(self, one: str, count: int) -> str:
        """Each count has one derivation: fewer than all whole blocks and a part of one, or all of them and the rest."""
        if count <= BLOCK:
            return repeat(one, 0, count)
        blocks, rest = divmod(count, BLOCK)
        block = self._block(one)
        fewer = sequence(self._up_to(block, blocks - 1), repeat(one, 0, BLOCK - 1))
        return choice([fewer, sequence(self._times(block, blocks), repeat(one, 0, rest))])

    def _block(self, one: str) -> str:
        return self.add(repeat(one, BLOCK, BLOCK), "block")

    def text(self, root: str) -> str:
        """The whole grammar, which begins with the expression `root`."""
        return "\n".join([f"root ::= {root}", *(f"{name} ::= {body}" for name, body in self._bodies.items())])


def too_large() -> ApiError:
    return bad_request(f"structured output: the grammar has more than {MAX_BYTES} bytes")


def literal(text: str) -> str:
    return '"' + "".join(_escaped(ord(char)) for char in text) + '"'


def char_set(ranges: Ranges) -> str:
    parts = []
    for low, high in ranges:
        cuts = [low, *(border for border in _UTF8_BORDERS if low < border <= high), high + 1]
        parts += [_range(begin, end - 1) for begin, end in zip(cuts, cuts[1:], strict=False)]
    return f"[{''.join(parts)}]"


def choice(expressions: Iterable[str]) -> str:
    found = list(dict.fromkeys(expressions))
    return found[0] if len(found) == 1 else f"({' | '.join(found)})"


def one_of(rules: Rules, texts: Iterable[str]) -> str:
    """One of the texts. Many share their beginnings in rules: a mask is then made in microseconds, not in tens of
    milliseconds for 20,000 of them.
    """
    found = list(dict.fromkeys(texts))
    return _tree(rules, found, MAX_DEPTH) if len(found) > FEW_TEXTS else choice(map(literal, found))


def _tree(rules: Rules, texts: list[str], depth: int) -> str:
    if not depth:
        return choice(map(literal, texts))
    by_char: dict[str, list[str]] = {}
    for text in texts:
        by_char.setdefault(text[:1], []).append(text)
    return choice(_branch(rules, branch, depth - 1) for branch in by_char.values())


def _branch(rules: Rules, texts: list[str], depth: int) -> str:
    """One of the texts, which have their first character in common."""
    begin = commonprefix(texts)
    rest = [text[len(begin) :] for text in texts]
    return literal(begin) if rest == [""] else sequence(literal(begin), rules.add(_tree(rules, rest, depth), "tree"))


def sequence(*expressions: str) -> str:
    return " ".join(part for part in expressions if part) or '""'


def repeat(expression: str, fewest: int, most: int | None) -> str:
    """`expression` from `fewest` to `most` times; None is without end."""
    if (fewest, most) == (1, 1):
        return expression
    if most == 0:
        return '""'
    marks = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    mark = marks.get((fewest, most)) or f"{{{fewest},{'' if most is None else most}}}"
    return f"({expression}){mark}"


def text_until(rules: Rules, end: str) -> str:
    """Any text up to the first `end`, and `end`. The first character of `end` comes in it once."""
    first, others = end[0], char_set(complement(of_chars(end[0])))
    states = [rules.reserve("until") for _ in end]
    rules.define(states[0], f"{others} {states[0]} | {literal(first)} {states[1]}")
    for index in range(1, len(end)):
        rest = char_set(complement(of_chars({first, end[index]})))
        after = f" {states[index + 1]}" if index + 1 < len(end) else ""
        rules.define(
            states[index],
            f"{literal(end[index])}{after} | {literal(first)} {states[1]} | {rest} {states[0]}",
        )
    return states[0]


def normalized(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ascending and apart."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return tuple(found)


def intersection(first: Ranges, second: Ranges) -> Ranges:
    pairs = ((max(a, c), min(b, d)) for a, b in first for c, d in second)
    return normalized((low, high) for low, high in pairs if low <= high)


def complement(ranges: Ranges) -> Ranges:
    """All other characters; surrogates are none."""
    begins = [0, *(high + 1 for _, high in ranges)]
    ends = [*(low - 1 for low, _ in ranges), MAX_CODE]
    gaps = tuple((low, high) for low, high in zip(begins, ends, strict=True) if low <= high)
    return intersection(gaps, EVERY_CHAR)


def of_chars(chars: Sequence[str] | str) -> Ranges:
    return normalized((ord(char), ord(char)) for char in chars)


def _escaped(code: int) -> str:
    char = chr(code)
    if char.isascii() and char.isalnum():
        return char
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _range(low: int, high: int) -> str:
    return _escaped(low) if low == high else f"{_escaped(low)}-{_escaped(high)}"
