"""Stop strings over token borders (SPEC 6.9, 7.4)."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through until one of the strings appears; holds back what could be the beginning of one."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._hold = 0 if include else max((len(stop) for stop in stops), default=1) - 1
        self._reach = max((len(stop) for stop in stops), default=1) - 1
        self._tail = ""  # text that is out (or held) and may be the beginning of a match
        self._held = 0  # characters at the end of the tail that are not out yet

    def feed(self, text: str, is_checked: bool = True) -> tuple[str, str | None]:
        """(text to show, the stop string that `text` completes)."""
        if not self._stops or not text:
            return text, None
        whole = self._tail + text
        out_from = len(self._tail) - self._held
        if is_checked and (found := self._find(whole)) is not None:
            stop, at = found
            end = at + len(stop) if self._include else at
            return whole[out_from : max(end, out_from)], stop
        out_to = max(len(whole) - self._hold, out_from)
        keep_from = max(min(len(whole) - self._reach, out_to), 0)
        self._tail, self._held = whole[keep_from:], len(whole) - out_to
        return whole[out_from:out_to], None

    def finish(self) -> str:
        """Return the text that was held, once no more can come."""
        held = self._tail[len(self._tail) - self._held :] if self._held else ""
        self._held = 0
        return held

    def _find(self, text: str) -> tuple[str, int] | None:
        """The first listed stop string that ends behind the tail: what ends before was searched, or not to be."""
        for stop in self._stops:
            at = text.find(stop, max(len(self._tail) - len(stop) + 1, 0))
            if at >= 0:
                return stop, at
        return None
