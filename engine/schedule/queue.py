"""Sequences that wait to run, in their order."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Container, Iterator

from fuseline.engine.state.sequence import Sequence

MOST_GONE = 64
"""Entries of the heap of short sequences that may be of sequences which no longer wait."""
MOST_COUNTED = 16
"""Short sequences whose tokens are counted in a step."""


class WaitingQueue:
    """A heap by `Sequence.order`. Removal marks: what has been removed is dropped when it comes up.

    Deferred sequences wait as well, each for a block that a running sequence computes. Short ones, of at most
    `short_tokens` tokens and not of a body of many prompts, are in a second heap too: they may pass the others.
    """

    def __init__(self, short_tokens: int = 0) -> None:
        self._short_tokens = short_tokens
        self._heap: list[tuple[tuple[float, ...], Sequence]] = []
        self._short: list[tuple[tuple[float, ...], Sequence]] = []
        self._members: set[Sequence] = set()
        self._deferred: dict[Sequence, bytes] = {}

    @property
    def num_deferred(self) -> int:
        return len(self._deferred)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._members

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members)

    def push(self, seq: Sequence) -> None:
        self._members.add(seq)
        heapq.heappush(self._heap, (seq.order, seq))
        if self.is_short(seq):
            if len(self._short) > MOST_GONE + 2 * len(self._members):
                self._short = [entry for entry in self._short if self._is_next(entry[1])]
                heapq.heapify(self._short)
            heapq.heappush(self._short, (seq.order, seq))

    def is_short(self, seq: Sequence) -> bool:
        """Whether a sequence may pass others while it waits."""
        return seq.num_tokens <= self._short_tokens and not seq.request.turn

    def peek(self) -> Sequence | None:
        """The next sequence that is not deferred."""
        return self._first(self._heap)

    def peek_short(self) -> Sequence | None:
        """The next short sequence that is not deferred."""
        return self._first(self._short)

    def num_short_tokens(self) -> int:
        """Tokens of the short sequences; of some of them if there are many."""
        first = itertools.islice(self._short, MOST_COUNTED)
        return sum(seq.num_tokens for _, seq in first if self._is_next(seq))

    def _first(self, heap: list[tuple[tuple[float, ...], Sequence]]) -> Sequence | None:
        while heap and not self._is_next(heap[0][1]):
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def _is_next(self, seq: Sequence) -> bool:
        return seq in self._members and seq not in self._deferred

    def defer(self, seq: Sequence, key: bytes) -> None:
        """Set a sequence aside until `resume` is told that its key is no longer awaited."""
        self._deferred[seq] = key

    def resume(self, awaited: Container[bytes]) -> None:
        """Put back the deferred sequences whose key is not in `awaited`, in their old order."""
        for seq in [seq for seq, key in self._deferred.items() if key not in awaited]:
            del self._deferred[seq]
            self.push(seq)

    def remove(self, seq: Sequence) -> None:
        self._members.discard(seq)
        self._deferred.pop(seq, None)
