"""JSON read as it comes and written as `json.dumps(value, ensure_ascii=False)` would: nothing waits for its end."""

from __future__ import annotations

import json
import re

from fuseline.api.parsers.source import Kept, NotACall, Reading, Sink, Source

MAX_DEPTH = 200
"""Nesting of objects and lists."""
MAX_NUMBER = 4096
MAX_KEY = 4096
"""Characters."""
PLAIN = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]*')
WORD = re.compile(r"[A-Za-z0-9+\-._]*")
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
HEX = frozenset("0123456789abcdefABCDEF")


def quoted(text: str) -> str:
    """`text` as JSON writes it inside of quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def read_value(source: Source, sink: Sink) -> Reading[None]:
    """Hand on the text of one value. Raises NotACall, CutShort where the output ends first."""
    closers: list[str] = []
    while True:
        letter = yield from source.need_after_blanks()
        if letter in "{[":
            closer = "}" if letter == "{" else "]"
            source.take(1)
            if len(closers) >= MAX_DEPTH:
                raise NotACall
            if (yield from _opens_empty(source, closer)):
                sink(letter + closer)
            else:
                sink(letter)
                closers.append(closer)
                if closer == "}":
                    yield from _key(source, sink)
                continue
        elif letter == '"':
            yield from read_string(source, sink)
        else:
            yield from _read_word(source, sink)
        if not (yield from _after_value(source, sink, closers)):
            return


def _opens_empty(source: Source, closer: str) -> Reading[bool]:
    """Whether a container ends at once. What cannot be inside of it is refused before anything of it is handed on."""
    letter = yield from source.need_after_blanks()
    if letter == closer:
        source.take(1)
        return True
    if letter not in ('"' if closer == "}" else '"{[-0123456789tfn'):
        raise NotACall
    return False


def _after_value(source: Source, sink: Sink, closers: list[str]) -> Reading[bool]:
    """Whether another value follows."""
    while closers:
        letter = yield from source.need_after_blanks()
        if letter == closers[-1]:
            sink(source.take(1))
            closers.pop()
        elif letter == ",":
            source.take(1)
            sink(", ")
            if closers[-1] == "}":
                yield from _key(source, sink)
            return True
        else:
            raise NotACall
    return False


def _key(source: Source, sink: Sink) -> Reading[None]:
    if (yield from source.need_after_blanks()) != '"':
        raise NotACall
    yield from read_string(source, sink)
    yield from _colon(source)
    sink(": ")


def _colon(source: Source) -> Reading[None]:
    yield from source.need_after_blanks()
    yield from source.expect(":")


def read_string(source: Source, sink: Sink) -> Reading[None]:
    """Hand on a string in quotes. Line breaks and other control characters, which JSON forbids, are escaped."""
    yield from source.expect('"')
    sink('"')
    while True:
        yield from source.run(PLAIN, sink)
        letter = yield from source.need()
        source.take(1)
        if letter == '"':
            sink('"')
            return
        sink(quoted((yield from _escaped(source)) if letter == "\\" else _whole(letter)))


def _whole(letter: str) -> str:
    """Half of a surrogate pair is no text."""
    return "\ufffd" if "\ud800" <= letter <= "\udfff" else letter


def _escaped(source: Source) -> Reading[str]:
    """Return the text of an escape sequence behind its backslash."""
    letter = yield from source.need()
    source.take(1)
    if letter != "u":
        if letter not in ESCAPES:
            raise NotACall
        return ESCAPES[letter]
    code = yield from _hex(source)
    if 0xD800 <= code < 0xDC00 and (yield from source.need()) == "\\":
        source.take(1)
        if (yield from source.need()) != "u":
            return "\ufffd" + (yield from _escaped(source))
        source.take(1)
        low = yield from _hex(source)
        if 0xDC00 <= low < 0xE000:
            return chr(0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00))
        return "\ufffd" + _whole(chr(low))
    return _whole(chr(code))


def _hex(source: Source) -> Reading[int]:
    digits = ""
    for _ in range(4):
        if (yield from source.need()) not in HEX:
            raise NotACall
        digits += source.take(1)
    return int(digits, 16)


def _read_word(source: Source, sink: Sink) -> Reading[None]:
    """A number, true, false or null, handed on whole."""
    word = yield from read_word(source)
    if word not in ("true", "false", "null") and not NUMBER.fullmatch(word):
        raise NotACall
    sink(word)


def read_word(source: Source) -> Reading[str]:
    """Return the letters, digits and signs that come next, once the character after them has come too."""
    kept = Kept(MAX_NUMBER)
    yield from source.run(WORD, kept)
    yield from source.need()
    return kept.text


def read_text(source: Source, most: int = MAX_KEY) -> Reading[str]:
    """Return the text of a string. Raises NotACall for what is none, or longer than `most` characters."""
    if (yield from source.need_after_blanks()) != '"':
        raise NotACall
    kept = Kept(most)
    yield from read_string(source, kept)
    return json.loads(kept.text)


def rewritten(text: str) -> str:
    """`text` as `read_value` hands it on. Raises NotACall for what is not one value."""
    source, parts = Source(), []
    source.feed(text + " ")  # a number ends with the character after it
    source.is_ended = True
    for _ in read_value(source, parts.append):
        pass
    if source.rest.strip():
        raise NotACall
    return "".join(parts)


def read_members(source: Source) -> Reading[str | None]:
    """Return the next key of an object whose brace (or last value) has been read; None behind its closing brace."""
    letter = yield from source.need_after_blanks()
    if letter == "}":
        source.take(1)
        return None
    if letter == ",":
        source.take(1)
    key = yield from read_text(source)
    yield from _colon(source)
    return key
