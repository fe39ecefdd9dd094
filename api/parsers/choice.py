"""One choice's text parsed as it comes: reasoning first, then tool calls in the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fuseline.api.output.events import Part
from fuseline.api.parsers.calls import CallSink, MakeId, hex_id
from fuseline.api.parsers.formats import IDS, ToolFormat, read_output, read_required
from fuseline.api.parsers.harmony import HarmonyReader
from fuseline.api.parsers.reasoning import ReasoningFormat, Start, ThinkingReader
from fuseline.api.parsers.source import Reading, Source

HARMONY = "harmony"
"""Stands for the one format that holds reasoning and calls in one stream."""
Choice = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True)
class ParseSettings:
    """How the text of a request's choices is parsed."""

    tools: dict[str, Any] = field(default_factory=dict)
    """Schemas of arguments by name; tools that this request may call."""
    choice: Choice = "none"
    named: str = ""
    """The function of choice named."""
    format: ToolFormat | Literal["harmony"] | None = None
    reasoning: ReasoningFormat | Literal["harmony"] | None = None
    start: Start = ""
    is_parallel: bool = True
    is_limited: bool = False
    """Calls of tools that are not among `tools` are text."""
    shows_reasoning: bool = True
    plugin: Callable[[int], ChoiceParser] | None = None
    """Makes the parser of a choice where the format is a plugin's."""

    @property
    def make_id(self) -> MakeId:
        return IDS[self.format.ids] if isinstance(self.format, ToolFormat) else hex_id


class ChoiceParser(Protocol):
    """Text of one choice in, events out."""

    @property
    def is_thinking(self) -> bool: ...

    @property
    def num_calls(self) -> int: ...

    def feed(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]: ...


def make_parser(index: int, settings: ParseSettings) -> ChoiceParser:
    """The parser of choice `index`."""
    return settings.plugin(index) if settings.plugin else TextParser(index, settings)


class _Pump:
    """A source and what reads it."""

    def __init__(self, read: Callable[[Source], Reading[None]]) -> None:
        self.source = Source()
        self._reading: Iterator[None] = read(self.source)

    def feed(self, text: str) -> None:
        self.source.feed(text)
        next(self._reading, None)

    def end(self) -> None:
        self.source.is_ended = True
        for _ in self._reading:
            pass


class TextParser:
    """The parser of declared formats."""

    def __init__(self, index: int, settings: ParseSettings) -> None:
        form = settings.format if isinstance(settings.format, ToolFormat) else None
        is_single = not settings.is_parallel or (settings.choice == "auto" and form is not None and form.is_single)
        needs_known = settings.is_limited or (form is not None and form.needs_known)
        strict_names = settings.choice == "auto" and needs_known
        is_forced = settings.choice in ("named", "required")
        limit = 1 if is_single else None
        self._sink = CallSink(index, settings.tools, settings.make_id, limit, strict_names, is_forced)
        self._calls = _Pump(_calls_reader(settings, self._sink))
        self._thinking, self._thought = _thinking_reader(settings, self._sink, self._calls)

    @property
    def is_thinking(self) -> bool:
        return self._thinking is not None and self._thinking.is_thinking

    @property
    def num_calls(self) -> int:
        return self._sink.num_calls

    @property
    def num_steps(self) -> int:
        """Characters looked at or copied."""
        return self._calls.source.num_steps + (self._thought.source.num_steps if self._thought else 0)

    def feed(self, text: str) -> list[Part]:
        if text:
            (self._thought or self._calls).feed(text)
        return self._sink.drain()

    def finish(self) -> list[Part]:
        if self._thought:
            self._thought.end()
        self._calls.end()
        self._sink.finish()
        return self._sink.drain()


def _calls_reader(settings: ParseSettings, sink: CallSink) -> Callable[[Source], Reading[None]]:
    """Return what reads the text behind the reasoning."""
    if settings.choice == "named":
        return lambda source: _read_named(source, sink, settings.named)
    if settings.choice == "required":
        return lambda source: read_required(source, sink)
    if settings.choice == "auto" and isinstance(settings.format, ToolFormat):
        form = settings.format
        return lambda source: read_output(source, sink, form)
    return lambda source: _read_text(source, sink)


def _thinking_reader(
    settings: ParseSettings, sink: CallSink, calls: _Pump
) -> tuple[ThinkingReader | HarmonyReader | None, _Pump | None]:
    """Return what reads reasoning, and the pump that it reads from."""
    is_forced = settings.choice in ("named", "required")  # then a grammar asks for channels
    has_calls = settings.format == HARMONY and settings.choice != "none" or settings.reasoning == HARMONY and is_forced
    if has_calls or settings.reasoning == HARMONY:
        harmony = HarmonyReader(has_calls)
        return harmony, _Pump(lambda source: harmony.read(source, sink))
    if settings.reasoning is None:
        return None, None
    thinking = ThinkingReader(settings.reasoning, settings.start)
    return thinking, _Pump(lambda source: thinking.read(source, sink.reasoning, calls.feed))


def _read_named(source: Source, sink: CallSink, name: str) -> Reading[None]:
    """All text is the arguments of one call."""
    sink.open(name)
    while (yield from source.peek()):
        sink.arguments(source.take(len(source.rest)))


def _read_text(source: Source, sink: CallSink) -> Reading[None]:
    while (yield from source.peek()):
        sink.text(source.take(len(source.rest)))
