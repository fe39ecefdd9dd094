"""The shapes in which models write calls: JSON objects, a header before JSON, and tags around each argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fuseline.api.parsers.calls import CallSink
from fuseline.api.parsers.json_text import quoted, read_members, read_text, read_value, rewritten
from fuseline.api.parsers.source import CutShort, NotACall, Reading, Sink, Source, markers
from fuseline.api.parsers.values import as_json, is_text

MAX_NAME = 256
"""Characters of a function's name and of what stands around it."""
MAX_ARGUMENTS = 2**22
"""Characters of arguments that are written as a string in JSON."""
ARGUMENT_KEYS = ("arguments", "parameters")
NAME_KEYS = ("name", "tool_name")
OTHER_KEYS = ("type", "id", "index", "tool_call_id")
"""Keys that may stand before the name."""
Read = Callable[[Source, CallSink], Reading[None]]


def read_calls(source: Source, sink: CallSink) -> Reading[None]:
    """Objects with a name and arguments, one or several, or a list of them. Raises NotACall."""
    letter = yield from source.need_after_blanks()
    is_list = letter == "["
    if is_list:
        source.take(1)
        letter = yield from source.need_after_blanks()
    while letter == "{":
        yield from _read_object(source, sink)
        source.record()
        letter = yield from source.blanks()
        while letter in (",", ";"):
            source.take(1)
            letter = yield from source.blanks()
    if is_list and letter == "]":
        source.take(1)
    elif is_list:
        raise NotACall if letter else CutShort
    if not sink.num_calls:
        raise NotACall


def read_call(source: Source, sink: CallSink) -> Reading[None]:
    """One object with a name and arguments. Raises NotACall."""
    yield from source.need_after_blanks()
    yield from _read_object(source, sink)


def _read_object(source: Source, sink: CallSink) -> Reading[None]:
    yield from source.expect("{")
    name, has_arguments = "", False
    early: list[str] = []
    while (key := (yield from read_members(source))) is not None:
        if key in NAME_KEYS and not name:
            name = yield from read_text(source, MAX_NAME)
            sink.open(name)
            for fragment in early:
                sink.arguments(fragment)
        elif key in ARGUMENT_KEYS and not has_arguments:
            yield from read_arguments(source, sink.arguments if name else early.append)
            has_arguments = True
        elif name or has_arguments or key in OTHER_KEYS:
            yield from read_value(source, _drop)
        else:
            raise NotACall
    if not name or not (has_arguments or name in sink.tools):  # any object may have a name
        raise NotACall
    sink.close()


def _drop(text: str) -> None:
    """Nothing reads it."""


def read_arguments(source: Source, sink: Sink) -> Reading[None]:
    """An object; also null, and an object that is written as a string. Raises NotACall."""
    letter = yield from source.need_after_blanks()
    if letter == "{":
        yield from read_value(source, sink)
    elif letter == '"':
        text = (yield from read_text(source, MAX_ARGUMENTS)).strip() or "{}"
        if not text.startswith("{"):
            raise NotACall
        sink(rewritten(text))
    elif letter == "n":
        yield from source.expect("null")
        sink("{}")
    else:
        raise NotACall


@dataclass(frozen=True)
class Headed:
    """A header that holds the name, then arguments as JSON."""

    ends: tuple[str, ...]
    """Markers of which one ends the header."""
    name_after: str = ""
    """Text in front of the name."""
    has_number: bool = False
    """The name is followed by a colon and a number, and the whole header is the call's id."""

    def takes_name(self, name: str) -> bool:
        return name == name.strip() and not any(mark in name for mark in (*self.ends, self.name_after) if mark)

    def __call__(self, source: Source, sink: CallSink) -> Reading[None]:
        header, _ = yield from source.short_until(markers(*self.ends), MAX_NAME)
        header = header.strip()
        name = header.rpartition(self.name_after)[2] if self.name_after else header
        if self.has_number:
            name = name.rpartition(":")[0] or name
            name = name.removeprefix("functions.")
        sink.open(name.strip(), header if self.has_number else "")
        yield from read_arguments(source, sink.arguments)
        sink.close()


@dataclass(frozen=True)
class Tagged:
    """The name, then arguments one by one, each between tags; their types are those of the tool's schema."""

    name_ends: tuple[str, ...]
    """Markers of which one ends the name."""
    key_opens: str
    key_ends: str
    value_ends: str
    closes: str
    value_opens: str = ""

    @property
    def own_markers(self) -> Sequence[str]:
        texts = (*self.name_ends, self.key_opens, self.key_ends, self.value_opens, self.value_ends, self.closes)
        return tuple(text for text in dict.fromkeys(texts) if text.strip())

    def takes_name(self, name: str) -> bool:
        return name == name.strip() and not any(mark in name for mark in self.name_ends)

    def __call__(self, source: Source, sink: CallSink) -> Reading[None]:
        name, end = yield from source.short_until(markers(*self.name_ends), MAX_NAME)
        sink.open(name.strip())
        schema = sink.tools.get(name.strip())
        before = "{"
        if end not in (self.key_opens, self.closes):
            end = yield from self._next(source)
        while end == self.key_opens:
            yield from self._argument(source, sink, schema, before)
            before = ", "
            end = yield from self._next(source)
        sink.arguments("{}" if before == "{" else "}")
        sink.close()

    def _next(self, source: Source) -> Reading[str]:
        """Return the marker of another argument or of the call's end, after blanks alone."""
        yield from source.need_after_blanks()
        found = yield from source.goes_on_with(markers(self.key_opens, self.closes))
        if found is None:
            raise NotACall if (yield from source.peek()) else CutShort
        return found

    def _argument(self, source: Source, sink: CallSink, schema: object, before: str) -> Reading[None]:
        key, _ = yield from source.short_until(markers(self.key_ends), MAX_NAME)
        if self.value_opens:
            yield from source.need_after_blanks()
            if (yield from source.goes_on_with(markers(self.value_opens))) is None:
                raise NotACall
        key = key.strip()
        head = f'{before}"{quoted(key)}": '
        ends = markers(self.value_ends)
        if is_text(schema, key):
            sink.arguments(head + '"')
            yield from source.need_until(ends, _Lines(sink.arguments))
            sink.arguments('"')
            return
        parts: list[str] = []
        yield from source.need_until(ends, parts.append)
        sink.arguments(head + as_json("".join(parts), schema, key))


class _Lines:
    """Text of a value as JSON, without the line breaks that stand next to its tags."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._is_begun = False
        self._held = ""

    def __call__(self, text: str) -> None:
        if not self._is_begun:
            self._is_begun = True
            text = text.removeprefix("\n")
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        if shown := text[: len(text) - len(self._held)]:
            self._sink(quoted(shown))
