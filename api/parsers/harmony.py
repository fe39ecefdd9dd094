"""Harmony, the format of gpt-oss: messages in channels, of which one answer has several.

<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f<|message|>{...}<|call|>
"""

from __future__ import annotations

import re

from fuseline.api.parsers.calls import CallSink
from fuseline.api.parsers.shapes import MAX_NAME, read_arguments
from fuseline.api.parsers.source import CutShort, NotACall, Reading, Source, markers

MARKS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
ENDS = markers("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")
HEADER = markers("<|message|>")
RECIPIENT = re.compile(r"\bto=(\S+?)(?=<\||\s|$)")
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class HarmonyReader:
    """Reads one choice. `is_thinking` tells where it stands; `has_tools`: whether calls are looked for."""

    def __init__(self, has_tools: bool) -> None:
        self._has_tools = has_tools
        self.is_thinking = False

    def read(self, source: Source, sink: CallSink) -> Reading[None]:
        # The prompt ends with <|start|>assistant, so the output begins within a header, or, of a wild model, with text.
        mark = yield from source.goes_on_with(markers("<|channel|>", "<|start|>", " to="))
        if mark is None:
            mark = yield from source.until(ENDS, sink.text)
        while mark is not None:
            if mark in ("<|end|>", "<|return|>", "<|call|>"):
                mark = yield from source.until(ENDS, sink.text)
                continue
            source.record(mark)
            try:
                header, _ = yield from source.short_until(HEADER, 2 * MAX_NAME)
            except NotACall as error:
                if not isinstance(error, CutShort):  # a header that is cut short holds nothing to show
                    sink.fail(source.recorded(), False)
                mark = yield from source.until(ENDS, sink.text)
                continue
            source.recorded()
            mark = yield from self._body(source, sink, mark + header)

    def _body(self, source: Source, sink: CallSink, header: str) -> Reading[str | None]:
        """A message; returns the mark that ends it."""
        channel = match[1] if (match := CHANNEL.search(header)) else "final"
        recipient = match[1] if (match := RECIPIENT.search(header)) else ""
        if self._has_tools and recipient.startswith("functions."):
            is_call = yield from self._call(source, sink, recipient.removeprefix("functions."))
            return (yield from source.until(ENDS, _drop if is_call else sink.text))
        self.is_thinking = channel == "analysis" or bool(recipient)
        mark = yield from source.until(ENDS, sink.reasoning if self.is_thinking else sink.text)
        self.is_thinking = False
        return mark

    def _call(self, source: Source, sink: CallSink, name: str) -> Reading[bool]:
        """Read a call's arguments. False: they are none, and their text is content."""
        source.record()
        try:
            sink.open(name)
            if (yield from source.need_after_blanks()) == "<":  # no arguments at all
                sink.close()
                return True
            yield from read_arguments(source, sink.arguments)
            sink.close()
        except NotACall as error:
            sink.fail(source.recorded(), isinstance(error, CutShort))
            return False
        return True


def _drop(text: str) -> None:
    """Text behind a call's arguments."""
