"""What a grammar backend is to the engine: it compiles a spec to a grammar, which gives each sequence a matcher."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np
import torch

from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import GrammarSpec


class TokenMatcher(Protocol):
    """Where one sequence is in its grammar."""

    def accept_token(self, token: int) -> bool:
        """Take a token; False, and nothing changes, for one that may not come."""

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens, at most `MOST_TAKEN_BACK`."""

    def is_terminated(self) -> bool:
        """Whether an ending token has been taken."""

    def fill_next_token_bitmask(self, mask: torch.Tensor) -> None:
        """Write int32 [1, ceil(V / 32)]: a bit for each token that may come next, ending ones included."""


class Grammar(Protocol):
    """A compiled grammar."""

    num_bytes: int
    """Memory that it takes, about."""
    is_slow: bool = False
    """Whether its masks take so long that no step shall wait for them."""

    def matcher(self, ends: Seq[int]) -> TokenMatcher:
        """A matcher of a new sequence, which the tokens `ends` may end where the grammar is complete."""

    def pack(self) -> bytes:
        """The grammar for `Backend.unpack` of another process; empty where compiling it anew takes less time."""


class Backend(Protocol):
    def compile(self, spec: GrammarSpec) -> Grammar:
        """Raises ValueError, or an exception of the package, for a grammar that it cannot compile."""

    def unpack(self, spec: GrammarSpec, data: bytes) -> Grammar:
        """The grammar that another process has compiled."""


MOST_TAKEN_BACK = 64


class EndingMatcher:
    """A matcher of a package that knows of text alone: the tokens that end a sequence are looked after here.

    Subclasses give `_advance`, `_take_back`, `_fill` and `_can_end`.
    """

    def __init__(self, ends: Seq[int], vocabulary: Vocabulary) -> None:
        self._ends = frozenset(ends)
        bits = np.zeros(-(-vocabulary.vocab_size // 32) * 32, np.uint8)
        bits[[token for token in ends if token < vocabulary.vocab_size]] = 1
        self._end_mask = np.packbits(bits, bitorder="little").view(np.int32)
        self._is_over = False

    def accept_token(self, token: int) -> bool:
        if self._is_over:
            return False
        if token in self._ends:
            self._is_over = self._can_end()
            return self._is_over
        return self._advance(token)

    def rollback(self, num_tokens: int) -> None:
        if self._is_over and num_tokens:
            self._is_over = False
            num_tokens -= 1
        if num_tokens:
            self._take_back(num_tokens)

    def is_terminated(self) -> bool:
        return self._is_over

    def fill_next_token_bitmask(self, mask: torch.Tensor) -> None:
        words = mask.numpy()[0]
        words[:] = 0
        self._fill(words)
        words &= ~self._end_mask
        if self._can_end():
            words |= self._end_mask

    def _advance(self, token: int) -> bool:
        raise NotImplementedError

    def _take_back(self, num_tokens: int) -> None:
        raise NotImplementedError

    def _fill(self, words: np.ndarray) -> None:
        """Set the bits [W] of tokens with text; `words` is zero."""
        raise NotImplementedError

    def _can_end(self) -> bool:
        raise NotImplementedError
