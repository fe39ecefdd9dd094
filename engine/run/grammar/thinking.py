"""Ends reasoning whose budget of tokens is spent: the text of its end is forced, token by token (SPEC 10)."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import ThinkingBudget
from fuseline.engine.state.sequence import TokenGrammar

MOST_HELD = 3
"""Tokens that the end waits for the bytes of a character to be complete."""


@dataclass(frozen=True)
class _Place:
    """Where the text is. `text`: as much of its end as marks need."""

    is_thinking: bool
    may_begin: bool
    text: bytes = b""
    num_tokens: int = 0
    """Tokens behind the first mark."""
    num_matched: int = 0
    """The last of them that are the first ones of the end."""

    @property
    def num_thoughts(self) -> int:
        return self.num_tokens - self.num_matched


class BudgetState:
    """Follows one sequence, beside its grammar if it has one. Its state is made of the tokens alone."""

    def __init__(self, budget: ThinkingBudget, vocabulary: Vocabulary, inner: TokenGrammar | None) -> None:
        self._budget, self._inner = budget, inner
        self._tokens, self._spelled = vocabulary.tokens, {token: text.encode() for token, text in budget.spelled}
        self._begins = [mark.encode() for mark in budget.begins]
        self._ends = [mark.encode() for mark in budget.ends]
        self._longest = max(map(len, (*self._begins, *self._ends)))
        self._width = -(-vocabulary.vocab_size // 32)
        self._place = _Place(is_thinking=budget.is_open, may_begin=not budget.is_open)
        self._lock = threading.RLock()
        """For `prepare`, which another thread calls."""
        self.num_seen = 0

    @property
    def is_plain(self) -> bool:
        return self._is_over and self._inner is not None and self._inner.is_plain

    @property
    def matcher(self) -> Any:
        return self._inner.matcher

    @property
    def is_slow(self) -> bool:
        return self._inner is not None and self._inner.is_slow

    def has_mask(self, num_tokens: int) -> bool:
        return self.num_seen == num_tokens and self._inner.has_mask(num_tokens)

    def prepare(self, begin: int, tokens: Seq[int]) -> None:
        with self._lock:
            new = tokens[self.num_seen - begin :]
            for token in new:
                self._place = self._after(self._place, token)
            self._inner.prepare(begin, tokens)
            self.num_seen += len(new)

    def note_slow(self) -> None:
        if self._inner:
            self._inner.note_slow()

    def advance(self, tokens: Seq[int]) -> None:
        with self._lock:
            for token in tokens:
                self._place = self._after(self._place, token)
            if self._inner:
                self._inner.advance(tokens)
            self.num_seen += len(tokens)

    def mask(self) -> np.ndarray:
        return self._masked(self._place, self._inner.mask() if self._inner else self._all())

    def masks(self, drafts: Seq[int]) -> np.ndarray:
        inner = self._inner.masks(drafts) if self._inner else [self._all()] * (1 + len(drafts))
        place, found = self._place, []
        for mask, token in zip(inner, (*drafts, None), strict=True):
            found.append(self._masked(place, mask))
            place = place if token is None else self._after(place, token)
        return np.stack(found)

    def forced(self, limit: int) -> list[int]:
        """The rest of the end, once it is due; behind the reasoning what the grammar forces."""
        if self._is_over:
            return self._inner.forced(limit) if self._inner else []
        begin = self._place.num_matched
        return list(self._budget.end_token_ids[begin : begin + limit]) if self._forced_token(self._place) else []

    @property
    def _is_over(self) -> bool:
        return not (self._place.is_thinking or self._place.may_begin)

    def _all(self) -> np.ndarray:
        return np.full(self._width, -1, np.int32)

    def _masked(self, place: _Place, mask: np.ndarray) -> np.ndarray:
        """A grammar that does not allow the end here is within a character: it is asked again behind the next token."""
        token = self._forced_token(place)
        if token is None or not mask[token // 32] >> (token % 32) & 1:
            return mask
        only = np.zeros(self._width * 32, np.uint8)
        only[token] = 1
        return np.packbits(only, bitorder="little").view(np.int32)

    def _forced_token(self, place: _Place) -> int | None:
        """The next token of the end, if it is due."""
        if not place.is_thinking or place.num_thoughts < self._budget.num_tokens:
            return None
        is_late = place.num_thoughts >= self._budget.num_tokens + MOST_HELD
        if not place.num_matched and not is_late and _is_within_character(place.text):
            return None
        return self._budget.end_token_ids[place.num_matched]

    def _after(self, place: _Place, token: int) -> _Place:
        if not (place.is_thinking or place.may_begin):
            return place
        text = place.text + (self._spelled.get(token) or (self._tokens[token] if token < len(self._tokens) else b""))
        if place.may_begin and not place.is_thinking:
            return self._before_thinking(place, text)
        end = self._budget.end_token_ids
        num_matched = place.num_matched + 1 if token == end[place.num_matched] else int(token == end[0])
        if num_matched == len(end) or any(mark in text for mark in self._ends):
            return _Place(is_thinking=False, may_begin=self._budget.may_resume, num_tokens=place.num_thoughts)
        kept = text[-self._longest :]
        return replace(place, text=kept, num_tokens=place.num_tokens + 1, num_matched=num_matched)

    def _before_thinking(self, place: _Place, text: bytes) -> _Place:
        """Reasoning begins with its mark, behind blanks at most, unless it may be resumed: then anywhere."""
        if any(begin in text for begin in self._begins):
            return replace(place, is_thinking=True, may_begin=False, text=b"")
        if self._budget.may_resume:
            return replace(place, text=text[-self._longest :])
        may_begin = any(begin.startswith(text.lstrip()[: len(begin)]) for begin in self._begins)
        return replace(place, may_begin=may_begin, text=text.lstrip())


def _is_within_character(text: bytes) -> bool:
    """Whether a text ends before a character of UTF-8 is complete."""
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte >= 0xC0:
            return back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
        if byte < 0x80:
            return False
    return False
