"""Sequences that wait for a place, in their order."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from fuseline.engine.request import Sequence


class WaitingQueue:
    """A heap by `Sequence.order`. Removal marks: what has been removed is dropped when it comes up."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], Sequence]] = []
        self._members: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._members

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members)

    def push(self, seq: Sequence) -> None:
        self._members.add(seq)
        heapq.heappush(self._heap, (seq.order, seq))

    def pop(self) -> Sequence:
        seq = self.peek()
        heapq.heappop(self._heap)
        self._members.discard(seq)
        return seq

    def peek(self) -> Sequence:
        """The next sequence; the queue must not be empty."""
        while self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def remove(self, seq: Sequence) -> None:
        self._members.discard(seq)
