"""Mistral's calls: a list of objects behind the mark, or (newer) one name with its arguments behind each."""

from __future__ import annotations

import re

from fuseline.api.parsers.calls import CallSink
from fuseline.api.parsers.shapes import MAX_NAME, read_arguments, read_calls
from fuseline.api.parsers.source import Kept, Reading, Source, markers

NAME = re.compile(r"[\w.\-]*")


def read_mistral(source: Source, sink: CallSink) -> Reading[None]:
    """`[{...}]`, `f{...}` or `f[CALL_ID]id[ARGS]{...}`."""
    if (yield from source.need_after_blanks()) in "[{":
        yield from read_calls(source, sink)
        return
    name = Kept(MAX_NAME)
    yield from source.run(NAME, name)
    written = ""
    if mark := (yield from source.goes_on_with(markers("[CALL_ID]", "[ARGS]"))):
        if mark == "[CALL_ID]":
            written, _ = yield from source.short_until(markers("[ARGS]"), MAX_NAME)
    sink.open(name.text, written)
    yield from read_arguments(source, sink.arguments)
    sink.close()
