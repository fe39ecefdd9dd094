"""Sequences that wait to run, in their order."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator

from fuseline.engine.state.sequence import Sequence


class WaitingQueue:
    """A heap by `Sequence.order`. Removal marks: what has been removed is dropped when it comes up.

    Deferred sequences wait as well, but are not in the heap: each for a block that a running sequence computes.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], Sequence]] = []
        self._members: set[Sequence] = set()
        self._deferred: dict[Sequence, bytes] = {}

    @property
    def num_deferred(self) -> int:
        return len(self._deferred)

    @property
    def has_next(self) -> bool:
        """Whether there is one that is not deferred."""
        return len(self._members) > len(self._deferred)

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
        """The next sequence that is not deferred; there must be one."""
        while self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def defer(self, key: bytes) -> None:
        """Set the next sequence aside until `resume` is told that its key is no longer awaited."""
        seq = self.pop()
        self._members.add(seq)
        self._deferred[seq] = key

    def resume(self, awaited: Container[bytes]) -> None:
        """Put back the deferred sequences whose key is not in `awaited`, in their old order."""
        for seq in [seq for seq, key in self._deferred.items() if key not in awaited]:
            del self._deferred[seq]
            self.push(seq)

    def remove(self, seq: Sequence) -> None:
        self._members.discard(seq)
        self._deferred.pop(seq, None)
