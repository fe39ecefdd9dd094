"""Model output as it comes, read by parsers that wait: a parser is a generator that yields when it needs more text.

A parser decides only on text that it has seen or on the end of the output, so where the output was split never shows in
what it finds. Read text is handed on in pieces; what is kept to be seen again is shorter than a marker, so the work for
a character is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""Reads from a source; yields where it needs more text."""
Sink = Callable[[str], object]
BLANKS = re.compile(r"[ \t\r\n]*")


def _drop(text: str) -> None:
    """Nothing reads it."""


class NotACall(Exception):
    """The text is not what its format announced."""


class CutShort(NotACall):
    """The output ended in the middle of a call."""


class Kept:
    """A sink that keeps up to `most` characters. Raises NotACall for more."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._parts: list[str] = []

    def __call__(self, text: str) -> None:
        self._left -= len(text)
        if self._left < 0:
            raise NotACall
        self._parts.append(text)

    @property
    def text(self) -> str:
        return "".join(self._parts)


class Markers:
    """Texts to look for. None may begin with another one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(dict.fromkeys(texts))
        self.longest = max(map(len, self.texts))
        self.pattern = re.compile("|".join(map(re.escape, self.texts)))
        self._firsts = {text[0] for text in self.texts}

    def num_held(self, tail: str) -> int:
        """Characters at the end of `tail` (shorter than a marker) that may begin a marker."""
        for at, letter in enumerate(tail):
            if letter in self._firsts and any(text.startswith(tail[at:]) for text in self.texts):
                return len(tail) - at
        return 0


@lru_cache(maxsize=1024)
def markers(*texts: str) -> Markers:
    return Markers(texts)


class Source:
    """Text that has come and has not been read yet."""

    def __init__(self) -> None:
        self._text, self._at = "", 0
        self._record: list[str] | None = None
        self.is_ended = False
        self.num_steps = 0
        """Characters looked at or copied so far, for the test that the work is linear."""

    def feed(self, text: str) -> None:
        self._text, self._at = self._text[self._at :] + text, 0
        self.num_steps += len(self._text)

    @property
    def rest(self) -> str:
        """Unread text that has come."""
        return self._text[self._at :]

    def record(self, begin: str = "") -> None:
        """Keep what is read from now on, behind `begin`."""
        self._record = [begin]

    def recorded(self) -> str:
        """Return what was read since `record`, and keep no more."""
        kept, self._record = self._record or [], None
        return "".join(kept)

    def take(self, count: int) -> str:
        """Read `count` characters that have come."""
        taken = self._text[self._at : self._at + count]
        self._at += count
        self.num_steps += count
        if self._record is not None and taken:
            self._record.append(taken)
        return taken

    def peek(self) -> Reading[str]:
        """Return the next character, "" at the end."""
        while self._at >= len(self._text):
            if self.is_ended:
                return ""
            yield
        return self._text[self._at]

    def need(self) -> Reading[str]:
        """Return the next character. Raises CutShort at the end."""
        letter = yield from self.peek()
        if not letter:
            raise CutShort
        return letter

    def blanks(self) -> Reading[str]:
        """Read blanks; return the character after them, "" at the end."""
        while True:
            self._match(BLANKS)
            letter = yield from self.peek()
            if letter not in (" ", "\t", "\r", "\n"):
                return letter

    def need_after_blanks(self) -> Reading[str]:
        letter = yield from self.blanks()
        if not letter:
            raise CutShort
        return letter

    def expect(self, text: str) -> Reading[None]:
        """Read exactly `text`. Raises NotACall."""
        for letter in text:
            if (yield from self.need()) != letter:
                raise NotACall
            self.take(1)

    def run(self, pattern: re.Pattern[str], sink: Sink) -> Reading[None]:
        """Hand on all text that a pattern of single characters (`[...]*`) matches."""
        while True:
            taken = self._match(pattern)
            if taken:
                sink(taken)
            if self._at < len(self._text) or not (yield from self.peek()):
                return

    def goes_on_with(self, found: Markers) -> Reading[str | None]:
        """Read and return the marker that comes next; None if none does."""
        while True:
            ahead = self._text[self._at : self._at + found.longest]
            self.num_steps += len(ahead)
            for text in found.texts:
                if ahead.startswith(text):
                    return self.take(len(text))
            if self.is_ended or not any(text.startswith(ahead) for text in found.texts):
                return None
            yield

    def until(self, found: Markers, sink: Sink, keeps_begun: bool = True) -> Reading[str | None]:
        """Hand on the text before the next marker, which is read and returned; None at the end of the output.

        `keeps_begun`: the beginning of a marker at the end of the output is text.
        """
        while True:
            match = found.pattern.search(self._text, self._at)
            self.num_steps += len(self._text) - self._at
            if match:
                self._hand_on(match.start() - self._at, sink)
                return self.take(match.end() - match.start())
            tail = self._text[max(self._at, len(self._text) - found.longest + 1) :]
            num_held = found.num_held(tail)
            self.num_steps += len(tail)
            self._hand_on(len(self._text) - self._at - num_held, sink)
            if self.is_ended:
                (sink if keeps_begun else _drop)(self.take(num_held))
                return None
            yield

    def need_until(self, found: Markers, sink: Sink) -> Reading[str]:
        """As `until`. Raises CutShort at the end."""
        marker = yield from self.until(found, sink, keeps_begun=False)
        if marker is None:
            raise CutShort
        return marker

    def short_until(self, found: Markers, most: int) -> Reading[tuple[str, str]]:
        """(text before the next marker, the marker). Raises NotACall for text longer than `most`."""
        kept = Kept(most)
        marker = yield from self.need_until(found, kept)
        return kept.text, marker

    def _match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        return self.take(match.end() - match.start()) if match else ""

    def _hand_on(self, count: int, sink: Sink) -> None:
        if count > 0:
            sink(self.take(count))
