"""Gemma's calls: `call:f{city:<|"|>Paris<|"|>,days:3}`, with bare keys and strings between marks of their own."""

from __future__ import annotations

from dataclasses import dataclass

from fuseline.api.parsers.calls import CallSink
from fuseline.api.parsers.json_text import MAX_DEPTH, NUMBER, quoted, read_word
from fuseline.api.parsers.shapes import MAX_NAME
from fuseline.api.parsers.source import NotACall, Reading, Sink, Source, markers

WORDS = ("true", "false", "null")


@dataclass(frozen=True)
class Gemma:
    """Reads calls."""

    quote: str
    """Mark on both sides of a string."""

    @property
    def own_markers(self) -> tuple[str, ...]:
        return (self.quote,)

    def takes_name(self, name: str) -> bool:
        return name == name.strip() and "{" not in name

    def __call__(self, source: Source, sink: CallSink) -> Reading[None]:
        yield from source.need_after_blanks()
        yield from source.expect("call:")
        name, _ = yield from source.short_until(markers("{"), MAX_NAME)
        sink.open(name.strip())
        closers = ["}"]
        if (yield from source.need_after_blanks()) == "}":
            sink.arguments("{")
        else:
            sink.arguments("{" + (yield from self._key(source)))
            yield from self._value(source, sink.arguments, closers)
        while closers:
            yield from self._after_value(source, sink.arguments, closers)
        sink.close()

    def _value(self, source: Source, sink: Sink, closers: list[str]) -> Reading[None]:
        """A value; of a container what opens it."""
        while (letter := (yield from source.need_after_blanks())) in "{[":
            source.take(1)
            closer = "}" if letter == "{" else "]"
            if len(closers) >= MAX_DEPTH:
                raise NotACall
            closers.append(closer)
            sink(letter)
            if (yield from source.need_after_blanks()) == closer:
                return
            if closer == "}":
                sink((yield from self._key(source)))
        if (yield from source.goes_on_with(markers(self.quote))):
            sink('"')
            yield from source.need_until(markers(self.quote), lambda text: sink(quoted(text)))
            sink('"')
            return
        word = yield from read_word(source)
        if word not in WORDS and not NUMBER.fullmatch(word):
            raise NotACall
        sink(word)

    def _after_value(self, source: Source, sink: Sink, closers: list[str]) -> Reading[None]:
        letter = yield from source.need_after_blanks()
        if letter == closers[-1]:
            sink(source.take(1))
            closers.pop()
            return
        yield from source.expect(",")
        sink(", ")
        if closers[-1] == "}":
            sink((yield from self._key(source)))
        yield from self._value(source, sink, closers)

    def _key(self, source: Source) -> Reading[str]:
        """Return a key and its colon as JSON."""
        yield from source.need_after_blanks()
        if (yield from source.goes_on_with(markers(self.quote))):
            key, _ = yield from source.short_until(markers(self.quote), MAX_NAME)
            yield from source.need_after_blanks()
            yield from source.expect(":")
        else:
            key, _ = yield from source.short_until(markers(":"), MAX_NAME)
        return f'"{quoted(key.strip())}": '
