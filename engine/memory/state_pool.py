"""Slots of recurrent states: one of fixed size for each running sequence of a model that has them."""

from __future__ import annotations


class StatePool:
    """Slots 0 to num_slots - 1. The next sequence that gets a slot has no use for what it holds: it begins at position
    0, where the model starts from the zero state.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of slots in use."""
        return 1 - len(self._free) / self.num_slots

    def allocate(self) -> int:
        """A slot; the caller has checked `num_free`."""
        return self._free.pop()

    def free(self, slot: int) -> None:
        self._free.append(slot)
