"""Token ids to text as they come, never half of a UTF-8 character.

The text of a sequence is what its tokens add to that of its prompt. Together the pieces are what Transformers decodes,
but for runs of byte-fallback tokens that begin as characters and go on as none: Transformers then takes the characters
back, which a stream has shown.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from itertools import islice

from fuseline.api.prompt.clean_up import CleanUp
from fuseline.api.prompt.encode import TextTokenizer

LOST = "\ufffd"
MAX_OPEN = 4
"""Tokens that an open character can have before its last one, and one more."""


class Detokenizer:
    """The text of one growing sequence."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        skip_special_tokens: bool,
        prompt: Sequence[int] = (),
        kept: frozenset[int] = frozenset(),
    ) -> None:
        """`prompt`: ids that the sequence continues. `kept`: special tokens that are never skipped."""
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.special_ids - kept if skip_special_tokens else frozenset()
        self._open = b""  # bytes of a character that is not whole yet
        self._is_broken = False  # the run of bytes has been no characters
        self._clean_up = CleanUp() if tokenizer.cleans_up else None
        self._previous: int | None = None
        self._continue(prompt)

    def fork(self) -> Detokenizer:
        """A sequence that goes on from here by itself."""
        made = object.__new__(Detokenizer)
        made.__dict__ |= self.__dict__
        made._clean_up = None if self._clean_up is None else CleanUp()
        return made

    def feed(self, token: int) -> str:
        """New text, empty while the token leaves a character open."""
        piece = None if token in self._skipped else self._pieces.piece(token, self._previous)
        if piece is None:
            return ""
        self._previous = token
        if type(piece) is bytes:
            text = self._add(piece)
        else:
            text = piece
            if self._open or self._is_broken:
                text = self._close() + piece
        return text if self._clean_up is None else self._clean_up.feed(text)

    def finish(self) -> str:
        """Return the text that is still held, incomplete characters as U+FFFD."""
        text = self._close()
        return text if self._clean_up is None else self._clean_up.feed(text) + self._clean_up.finish()

    def _continue(self, prompt: Sequence[int]) -> None:
        """Find the last token that has a text, and the bytes of a character that the prompt leaves open."""
        has_text = (k for k in range(len(prompt) - 1, -1, -1) if self._shows(prompt[k]))
        last = [prompt[k] for k in islice(has_text, MAX_OPEN)]
        if not last:
            return
        self._previous = last[0]
        for token in reversed(last):
            piece = self._pieces.inner(token)
            if type(piece) is bytes:
                self._add(piece)
            else:
                self._close()

    def _shows(self, token: int) -> bool:
        return token not in self._skipped and self._pieces.piece(token, token) is not None

    def _add(self, piece: bytes) -> str:
        if not self._pieces.has_runs:
            data = self._open + piece
            text, used = utf_8_decode(data, "replace", False)
            self._open = data[used:]
            return text
        if self._is_broken:
            return LOST * len(piece)
        data = self._open + piece
        try:
            text, used = utf_8_decode(data, "strict", False)
            self._open = data[used:]
        except UnicodeDecodeError as error:
            self._is_broken, self._open = True, b""
            text = data[: error.start].decode() + LOST * (len(data) - error.start)
        return text

    def _close(self) -> str:
        """Text of an open character that does not go on."""
        left = len(self._open) if self._pieces.has_runs else bool(self._open)
        self._open, self._is_broken = b"", False
        return LOST * left
