"""Calls written as Python: `[f(a=1, b="x"), g(c=[1, 2])]`. Its literals are read here and never evaluated."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fuseline.api.parsers.calls import CallSink
from fuseline.api.parsers.json_text import MAX_DEPTH, NUMBER, quoted, read_word
from fuseline.api.parsers.shapes import MAX_NAME
from fuseline.api.parsers.source import Kept, NotACall, Reading, Sink, Source

WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
NAME = re.compile(r"[A-Za-z0-9_.\-]*")
KEY = re.compile(r"\w*")
PLAIN = {'"': re.compile(r'[^"\\\n]*'), "'": re.compile(r"[^'\\\n]*")}
ESCAPES = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v"}
WIDTHS = {"x": 2, "u": 4, "U": 8}
LOOSE_NUMBER = re.compile(r"([+-]?)(\d[\d_]*)?(?:(\.)(\d[\d_]*)?)?([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Pythonic:
    """Calls in a list, or one a line."""

    is_list: bool = True

    def takes_name(self, name: str) -> bool:
        return bool(NAME.fullmatch(name)) and (name[0].isalpha() or name[0] == "_")

    def __call__(self, source: Source, sink: CallSink) -> Reading[None]:
        letter = yield from source.need_after_blanks()
        is_list = self.is_list or letter == "["
        if is_list:
            yield from source.expect("[")
            letter = yield from source.need_after_blanks()
        while letter.isalpha() or letter == "_":
            yield from _read_call(source, sink)
            source.record()
            letter = yield from source.blanks()
            if letter == ",":
                source.take(1)
                letter = yield from source.blanks()
        if is_list:
            yield from source.expect("]")
        if not sink.num_calls:
            raise NotACall


def _read_call(source: Source, sink: CallSink) -> Reading[None]:
    name = yield from _name(source, NAME)
    yield from source.expect("(")
    sink.open(name)
    keys: set[str] = set()
    letter = yield from source.need_after_blanks()
    while letter != ")":
        key = yield from _name(source, KEY)
        if not key.isidentifier() or key in keys:
            raise NotACall
        yield from source.need_after_blanks()
        yield from source.expect("=")
        # Nothing is told of the call before its first value has begun like one.
        yield from _value_begins(source)
        sink.arguments(f'{", " if keys else "{"}"{key}": ')
        keys.add(key)
        yield from read_literal(source, sink.arguments)
        letter = yield from source.need_after_blanks()
        if letter == ",":
            source.take(1)
            letter = yield from source.need_after_blanks()
        elif letter != ")":
            raise NotACall
    source.take(1)
    sink.arguments("}" if keys else "{}")
    sink.close()


def _name(source: Source, pattern: re.Pattern[str]) -> Reading[str]:
    kept = Kept(MAX_NAME)
    yield from source.run(pattern, kept)
    return kept.text


def _value_begins(source: Source) -> Reading[None]:
    letter = yield from source.need_after_blanks()
    if letter not in "\"'[({+-.0123456789TFNtfn":
        raise NotACall


def read_literal(source: Source, sink: Sink) -> Reading[None]:
    """Hand on a Python literal as JSON. Raises NotACall for anything else."""
    closers: list[str] = []
    while True:
        letter = yield from source.need_after_blanks()
        if letter in "[({":
            source.take(1)
            if len(closers) >= MAX_DEPTH:
                raise NotACall
            closers.append({"[": "]", "(": ")", "{": "}"}[letter])
            sink("{" if letter == "{" else "[")
            if (yield from source.need_after_blanks()) != closers[-1]:
                yield from _key(source, sink, closers[-1])
                continue
        elif letter in "\"'":
            yield from read_string(source, sink)
        else:
            sink(_word((yield from read_word(source))))
        if not (yield from _after_value(source, sink, closers)):
            return


def _after_value(source: Source, sink: Sink, closers: list[str]) -> Reading[bool]:
    """Whether another value follows."""
    while closers:
        letter = yield from source.need_after_blanks()
        if letter == ",":
            source.take(1)
            letter = yield from source.need_after_blanks()
            if letter != closers[-1]:
                sink(", ")
                yield from _key(source, sink, closers[-1])
                return True
        if letter != closers[-1]:
            raise NotACall
        source.take(1)
        sink("}" if closers.pop() == "}" else "]")
    return False


def _key(source: Source, sink: Sink, closer: str) -> Reading[None]:
    if closer != "}":
        return
    if (yield from source.need()) in "\"'":
        yield from read_string(source, sink)
    else:
        sink(f'"{_word((yield from read_word(source)))}"')
    yield from source.need_after_blanks()
    yield from source.expect(":")
    sink(": ")


def _word(word: str) -> str:
    """A number or a constant as JSON."""
    if word in WORDS:
        return WORDS[word]
    if NUMBER.fullmatch(word):
        return word
    match = LOOSE_NUMBER.fullmatch(word)
    if match is None or not (match[2] or match[4]):
        raise NotACall
    sign, whole, point, part, exponent = (group or "" for group in match.groups())
    whole = whole.replace("_", "")
    if len(whole) > 1 and whole.startswith("0") and not (point or exponent) and whole.strip("0"):
        raise NotACall
    part = f".{part.replace('_', '') or '0'}" if point else ""
    return f"{'-' if sign == '-' else ''}{whole.lstrip('0') or '0'}{part}{exponent}"


def read_string(source: Source, sink: Sink) -> Reading[None]:
    """Hand on a Python string as one of JSON."""
    mark = yield from source.need()
    source.take(1)
    sink('"')
    while True:
        yield from source.run(PLAIN[mark], lambda text: sink(quoted(text)))
        letter = yield from source.need()
        source.take(1)
        if letter == mark:
            sink('"')
            return
        sink(quoted((yield from _escaped(source)) if letter == "\\" else letter))


def _escaped(source: Source) -> Reading[str]:
    letter = yield from source.need()
    source.take(1)
    if letter in WIDTHS:
        return (yield from _code(source, WIDTHS[letter]))
    if letter == "\n":
        return ""
    if letter in "01234567":
        digits = letter
        while len(digits) < 3 and (yield from source.need()) in "01234567":
            digits += source.take(1)
        return chr(int(digits, 8))
    return ESCAPES.get(letter, "\\" + letter)


def _code(source: Source, width: int) -> Reading[str]:
    digits = ""
    for _ in range(width):
        if (yield from source.need()) not in "0123456789abcdefABCDEF":
            raise NotACall
        digits += source.take(1)
    code = int(digits, 16)
    if code > 0x10FFFF:
        raise NotACall
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)
