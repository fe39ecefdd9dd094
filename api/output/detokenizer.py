"""Token ids to text as they come, never half of a UTF-8 character."""

from __future__ import annotations

from fuseline.api.prompt.encode import TextTokenizer

MAX_HELD = 8
"""Tokens after which bytes that still form no character are shown as U+FFFD."""


class Detokenizer:
    """The text of one growing sequence. Decodes a short window, since a token's text can depend on the one before."""

    def __init__(self, tokenizer: TextTokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._num_shown = 0  # tokens of the window whose text is out

    def feed(self, token_id: int) -> str:
        """New text, empty while the token leaves a character open."""
        self._window.append(token_id)
        old = self._decode(self._window[: self._num_shown])
        new = self._decode(self._window)
        if new.endswith("\ufffd") and len(self._window) - self._num_shown < MAX_HELD:
            return ""
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return new[len(old) :]

    def finish(self) -> str:
        """Return the text that is still held, incomplete characters as U+FFFD."""
        old = self._decode(self._window[: self._num_shown])
        new = self._decode(self._window)
        self._num_shown = len(self._window)
        return new[len(old) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip) if ids else ""
