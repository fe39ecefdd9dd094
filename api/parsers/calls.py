"""Where parsers put what they find in one choice: content, reasoning and tool calls, as events in their order."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping
from typing import Any

from fuseline.api.output.events import CallRevoked, Part, ReasoningDelta, TextDelta, ToolCallDelta
from fuseline.api.parsers.source import NotACall

MakeId = Callable[[int, str], str]
"""(number of the call, the id that the model wrote or "") -> id."""
LETTERS = string.ascii_letters + string.digits


def hex_id(number: int, written: str) -> str:
    return f"chatcmpl-tool-{secrets.token_hex(16)}"


def nine_letters(number: int, written: str) -> str:
    """Return an id of the form that Mistral's templates demand."""
    return "".join(secrets.choice(LETTERS) for _ in range(9))


def written_id(number: int, written: str) -> str:
    """Return the model's own id, which its template writes back."""
    return written or hex_id(number, written)


class CallSink:
    """Events of one choice.

    A call is announced with the first of its arguments: until then its text can still turn out to be content. Text
    after a call is dropped, and so is text of blanks alone in front of one.
    """

    def __init__(
        self,
        index: int,
        tools: Mapping[str, Any],
        make_id: MakeId = hex_id,
        limit: int | None = None,
        strict_names: bool = False,
        is_forced: bool = False,
    ) -> None:
        """`tools`: schemas of arguments by name. `limit`: calls that are handed on; more are dropped. `is_forced`: all
        text is calls, of which the last may be cut short.
        """
        self.tools = tools
        self._index, self._make_id, self._limit, self._strict_names = index, make_id, limit, strict_names
        self._is_forced = is_forced
        self._parts: list[Part] = []
        self._pieces: list[str] = []
        """Text of the last event."""
        self._blanks: list[str] = []
        """Text so far, while it is blank."""
        self.has_content = False
        self._open: tuple[str, str] | None = None
        """Name and written id of the call that is being read."""
        self._is_announced = False
        self._is_dropped = False
        self._num_announced = 0
        self.num_calls = 0

    def drain(self) -> list[Part]:
        """Return the events since the last call of this."""
        self._join()
        parts, self._parts = self._parts, []
        return parts

    def reasoning(self, text: str) -> None:
        if text:
            self._add(ReasoningDelta, text)

    def text(self, text: str) -> None:
        """Text outside of calls."""
        if self.num_calls or self._is_forced or not text:
            return
        if not self.has_content and text.isspace():
            self._blanks.append(text)
            return
        self._content(text)

    def open(self, name: str, written: str = "") -> None:
        """A call begins. Raises NotACall for a name that cannot be one."""
        if not name or (self._strict_names and name not in self.tools):
            raise NotACall
        self._open = name, written
        self._is_announced = False
        self._is_dropped = self._limit is not None and self.num_calls >= self._limit

    def arguments(self, fragment: str) -> None:
        """More of the open call's arguments, as JSON text."""
        if self._is_dropped or not fragment:
            return
        if self._is_announced:
            self._add(ToolCallDelta, fragment)
            return
        name, written = self._open
        call = self._num_announced
        self._start(ToolCallDelta(self._index, call, "", self._make_id(call, written), name), fragment)
        self._is_announced = True
        self._num_announced += 1
        self.num_calls += 1

    def close(self) -> None:
        """The open call is complete."""
        if not self._is_announced:
            self.arguments("{}")
        self._open, self._is_announced, self._is_dropped = None, False, False

    def fail(self, raw: str, is_cut: bool) -> None:
        """`raw` began like a call and is none. A call that is announced stays where the output is merely cut short."""
        was_announced, was_dropped = self._is_announced, self._is_dropped
        self._open, self._is_announced, self._is_dropped = None, False, False
        if was_dropped or (is_cut and (was_announced or self._is_forced)):
            return
        if was_announced:
            self.num_calls -= 1
            self._start(CallRevoked(self._index, self._num_announced - 1), "")
        if raw:
            self._content(raw)

    def finish(self) -> None:
        """No more text comes."""
        if self._blanks and not self.num_calls:
            self._content("")

    def _content(self, text: str) -> None:
        self.has_content = True
        blanks, self._blanks = "".join(self._blanks), []
        if blanks or text:
            self._add(TextDelta, blanks + text)

    def _add(self, kind: type[Part], text: str) -> None:
        """More text of the last event, if it is of that kind, else a new one."""
        if self._parts and isinstance(self._parts[-1], kind):
            self._pieces.append(text)
        elif kind is ToolCallDelta:
            self._start(ToolCallDelta(self._index, self._num_announced - 1, ""), text)
        else:
            self._start(kind(self._index, ""), text)

    def _start(self, part: Part, text: str) -> None:
        self._join()
        self._parts.append(part)
        self._pieces = [text]

    def _join(self) -> None:
        """Give the last event its text."""
        if not self._parts or isinstance(self._parts[-1], CallRevoked):
            return
        last, text = self._parts[-1], "".join(self._pieces)
        if isinstance(last, ToolCallDelta):
            last.arguments = text
        else:
            last.text = text
