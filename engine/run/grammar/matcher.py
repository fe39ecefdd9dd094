"""Where a sequence is in its grammar: from its tokens to those that may come next, as bits over the vocabulary."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence as Seq

import numpy as np
import torch

from fuseline.engine.params import SamplingParams
from fuseline.engine.run.grammar.backends.interface import Grammar
from fuseline.engine.run.grammar.backends.xgrammar import XGrammar

logger = logging.getLogger("fuseline.engine")

MOST_FORCED = 15
"""Tokens that one step may take where the grammar leaves no choice."""
FORCED_SECONDS = 0.005
"""Processor time after which a step looks for no more of them: a large grammar takes tens of milliseconds for one."""
SLOW_SECONDS = 2.0
"""Time for one mask from which on a grammar is too slow to be served: its request ends."""
STALL_SECONDS = 0.02
"""Time for the masks of a step from which on those that are to follow are made beside the steps."""
FAST_SECONDS = 0.002
"""Time for a mask beside the steps up to which the next one may be made within a step again."""


class GrammarState:
    """Follows the generated tokens of one sequence. Masks are int32 [ceil(V / 32)], a bit for each token.

    State is made of the tokens alone, so a sequence that was preempted goes on where it was.
    """

    def __init__(self, grammar: Grammar, params: SamplingParams, vocab_size: int) -> None:
        self._ends = params.ending_token_ids
        self.matcher = grammar.matcher(self._ends)
        self._is_batched = isinstance(grammar, XGrammar) and not grammar.has_free_text
        self._starts_after = params.grammar.starts_after
        self._min_tokens = params.min_tokens
        self._tail: tuple[int, ...] = ()
        self._is_open = not self._starts_after
        self._is_broken = False
        self._ends_mask = _bits(self._ends, vocab_size)
        self._width = -(-vocab_size // 32)
        self._scratch = torch.empty((1, self._width), dtype=torch.int32)
        self._planned: tuple[int, np.ndarray] = (-1, np.empty((0, self._width), np.int32))
        self._ready: tuple[int, np.ndarray] | None = None
        self._is_known_slow = self._was_slow = grammar.is_slow
        self._lock = threading.RLock()
        """For `prepare`, which another thread calls."""
        self.num_seen = 0
        """Generated tokens taken so far."""

    @property
    def is_plain(self) -> bool:
        """Whether `mask` is what xgrammar's matcher fills, and nothing else."""
        is_batched = self._is_batched and not self._was_slow
        is_held = self._is_open and not self._is_broken and self.num_seen >= self._min_tokens
        return is_batched and is_held and not self.matcher.is_terminated()

    @property
    def is_slow(self) -> bool:
        """Whether masks are made beside the steps, by `prepare`."""
        return self._was_slow and not self._is_broken

    def has_mask(self, num_tokens: int) -> bool:
        """Whether the mask behind so many generated tokens is made."""
        return self._ready is not None and self._ready[0] == num_tokens

    def prepare(self, begin: int, tokens: Seq[int]) -> None:
        """Take the generated tokens from number `begin` on, and make the mask behind them. For another thread."""
        with self._lock:
            started = time.thread_time()
            try:
                self.advance(tokens[self.num_seen - begin :])
                mask = self.mask()
            except Exception:
                logger.exception("the mask of a grammar cannot be made: its request ends")
                self._is_broken = True
                mask = np.zeros(self._width, np.int32)
            self._ready = self.num_seen, mask
            self._was_slow = self._is_known_slow or time.thread_time() - started > FAST_SECONDS

    def note_slow(self) -> None:
        """A step has waited for this grammar: no other one shall."""
        self._was_slow = True

    def advance(self, tokens: Seq[int]) -> None:
        """Take the generated tokens that follow those seen."""
        with self._lock:
            for token in tokens:
                self._accept(token)
            self.num_seen += len(tokens)

    def masks(self, drafts: Seq[int]) -> np.ndarray:
        """[1 + D, W]: what may come next, and after each of the drafts; those behind a draft that may not come are of
        no use to anyone.
        """
        length, planned = self._planned
        if length == self.num_seen and len(drafts) < len(planned):
            return planned[: 1 + len(drafts)]
        found, num_accepted = [self.mask(0)], 0
        state = self._tail, self._is_open
        for draft in drafts:
            was_open = self._is_open
            if not self._is_broken and not self._may(found[-1], draft):
                found.append(found[-1])
                continue
            self._accept(draft)
            num_accepted += was_open
            found.append(self.mask(len(found)))
        if num_accepted:
            self.matcher.rollback(num_accepted)
        self._tail, self._is_open = state
        return np.stack(found)

    def forced(self, limit: int) -> list[int]:
        """The next tokens, at most `limit`, as far as only one may come and it does not end the sequence."""
        if not self._is_open or self._is_broken:
            return []
        found: list[int] = []
        deadline = time.thread_time() + FORCED_SECONDS
        masks = [self.mask(0)]
        while len(found) < limit and (token := _only(masks[-1])) is not None and token not in self._ends:
            if time.thread_time() > deadline or not self.matcher.accept_token(token):
                break
            found.append(token)
            masks.append(self.mask(len(found)))
        if found:
            self.matcher.rollback(len(found))
        self._planned = (self.num_seen, np.stack(masks) if found else masks[0][None])
        return found

    def _accept(self, token: int) -> None:
        if self._is_broken or self.matcher.is_terminated():
            return
        if self._is_open:
            # Never false for a token that a mask has allowed. Were it, the request must end rather than go astray.
            self._is_broken = not self.matcher.accept_token(token)
            return
        self._tail = (*self._tail, token)[-len(self._starts_after) :]
        self._is_open = self._tail == self._starts_after

    def _may(self, mask: np.ndarray, token: int) -> bool:
        return bool(mask[token // 32] >> (token % 32) & 1)

    def mask(self, num_drafts: int = 0) -> np.ndarray:
        """[W]: what may come next; the last `num_drafts` tokens that the matcher has are drafts."""
        with self._lock:
            if not num_drafts and self.has_mask(self.num_seen):
                return self._ready[1]
            return self._make_mask(num_drafts)

    def _make_mask(self, num_drafts: int) -> np.ndarray:
        mask = self._scratch.numpy()[0]
        mask.fill(-1)
        if self._is_broken:
            mask[:] = 0
        elif not self._is_open:
            mask &= ~self._ends_mask
        elif not self.matcher.is_terminated():
            begin = time.perf_counter()
            self.matcher.fill_next_token_bitmask(self._scratch)
            if time.perf_counter() - begin > SLOW_SECONDS:
                logger.warning("a grammar is too slow to be served: its request ends")
                self._is_broken = True
                mask[:] = 0
            if self.num_seen + num_drafts < self._min_tokens and (mask & ~self._ends_mask).any():
                mask &= ~self._ends_mask
        return mask.copy()


def _bits(tokens: Seq[int], vocab_size: int) -> np.ndarray:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[[token for token in tokens if token < vocab_size]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _only(mask: np.ndarray) -> int | None:
    """The token of a mask that has one; None if it has others."""
    words = mask.nonzero()[0]
    if len(words) != 1:
        return None
    word = int(mask[words[0]]) & 0xFFFFFFFF
    return None if word & (word - 1) else int(words[0]) * 32 + word.bit_length() - 1
