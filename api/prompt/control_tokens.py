"""Text of a conversation that spells a control token stays text; only the template writes control tokens.

The conversation is rendered a second time with marks where its own text spells one (or begins or ends as one, for a
template that joins two texts). The marks tell whose each control token of the prompt is. They stand where templates
look least: behind a token that a text begins with, else before it, so that `startswith`, `endswith` and `in` find what
they look for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

BEFORE, BEHIND, EDGE = "\ue000", "\ue001", "\ue002"
"""Marks: the token that follows is the conversation's; the one before is; here one text ends."""
MARKS = re.compile(f"[{BEFORE}{BEHIND}{EDGE}]")
ESCAPES = {repr(mark)[1:-1]: mark for mark in (BEFORE, BEHIND, EDGE)}
"""Marks as `tojson(ensure_ascii=true)` writes them."""
Spans = tuple[tuple[int, int], ...]


class ControlTokens:
    """Control tokens of a model and one of its templates.

    `special`: never text of a conversation. `markers`: other tokens that the template writes (of thinking, of tool
    calls), which stay tokens in the messages of the assistant: the model wrote them.
    """

    def __init__(self, special: Iterable[str], markers: Iterable[str]) -> None:
        special, markers = list(filter(None, special)), list(markers)
        self._special, self._all = _alternatives(special), _alternatives([*special, *markers])
        names = [*special, *markers]
        self._most = max(map(len, names), default=1) - 1  # characters of the longest beginning or end
        self._first, self._last = {name[0] for name in names}, {name[-1] for name in names}
        self._suspect = re.compile(f"[{re.escape(''.join(self._first | self._last))}{BEFORE}{BEHIND}{EDGE}]")
        self._beginnings = {name[:n] for name in names for n in range(1, len(name))}
        self._ends = {name[n:] for name in names for n in range(1, len(name))}

    def mark(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> tuple[list, dict] | None:
        """The same with marks; None where nothing is to be marked."""
        marked = [
            self._mark(message, self._special if message.get("role") == "assistant" else self._all)
            for message in messages
        ]
        rest = self._mark(variables, self._all)
        return None if marked == messages and rest == variables else (marked, rest)

    def find(self, text: str, marked: str) -> tuple[str, Spans]:
        """The prompt, and where it spells control tokens that are text.

        `text`: the prompt as the template makes it; `marked`: the same of the marked conversation. Where the marks have
        changed what the template does, the prompt is what it has done then.
        """
        for escape, mark in ESCAPES.items():
            marked = marked.replace(escape, mark)
        clean, spans = self._read(marked)
        if clean == text:
            return text, tuple(span for span, is_own in spans if is_own)
        found = list(self._all.finditer(text))
        if [match[0] for match in found] == [clean[begin:end] for (begin, end), _ in spans]:
            own = (match.span() for match, (_, is_own) in zip(found, spans, strict=True) if is_own)
            return text, tuple(own)
        return clean, tuple(span for span, is_own in spans if is_own)

    def _read(self, marked: str) -> tuple[str, list[tuple[tuple[int, int], bool]]]:
        """Text without marks, and each control token in it with whether it is the conversation's own."""
        clean, places, length = [], {}, 0
        at = 0
        for mark in MARKS.finditer(marked):
            clean.append(marked[at : mark.start()])
            length += mark.start() - at
            places.setdefault(length, set()).add(mark[0])
            at = mark.end()
        text = "".join([*clean, marked[at:]])
        spans = [match.span() for match in self._all.finditer(text)]
        return text, [(span, _is_own(span, places)) for span in spans]

    def _mark(self, value: Any, pattern: re.Pattern) -> Any:
        if isinstance(value, str):
            return self._mark_text(value, pattern)
        if isinstance(value, dict):
            return {self._mark(key, pattern): self._mark(item, pattern) for key, item in value.items()}
        return [self._mark(item, pattern) for item in value] if isinstance(value, list) else value

    def _mark_text(self, text: str, pattern: re.Pattern) -> str:
        if not self._suspect.search(text):
            return text
        marked = text = MARKS.sub("", text)
        if pattern.search(text):
            first = len(text) - len(text.lstrip())
            marked = pattern.sub(lambda match: match[0] + BEHIND if match.start() <= first else BEFORE + match[0], text)
        head, tail = text[: self._most], text[max(len(text) - self._most, 0) :]
        if any(c in tail for c in self._first) and any(tail[k:] in self._beginnings for k in range(len(tail))):
            marked += EDGE
        if any(c in head for c in self._last) and any(head[:k] in self._ends for k in range(1, len(head) + 1)):
            marked = EDGE + marked
        return marked


def _is_own(span: tuple[int, int], places: dict[int, set[str]]) -> bool:
    begin, end = span
    has_inner = any(place in places for place in range(begin + 1, end))
    return has_inner or BEFORE in places.get(begin, ()) or BEHIND in places.get(end, ())


def _alternatives(names: list[str]) -> re.Pattern:
    """The longest one of names that begin alike. Grouped by their beginnings, of which a text has few."""
    groups = (list(group) for _, group in groupby(sorted(names), key=lambda name: name[:2]))
    return re.compile("|".join(_group(group) for group in groups) or "(?!)")


def _group(names: list[str]) -> str:
    return "(?:" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")"


def split(text: str, spans: Spans) -> Iterator[tuple[str, bool]]:
    """Pieces of the text, each with whether it is one of the spans."""
    at = 0
    for begin, end in spans:
        yield text[at:begin], False
        yield text[begin:end], True
        at = end
    yield text[at:], False
