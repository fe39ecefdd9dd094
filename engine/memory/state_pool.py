"""Slots of recurrent states: those of running sequences, and snapshots at block borders that the prefix cache finds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from fuseline.engine.memory.prefix_cache import PrefixTree

MAX_KNOWN_KEYS = 1 << 16
"""Keys of computed blocks that are remembered, of about 150 bytes each."""


@dataclass
class _Snapshot:
    slot: int
    owner: str
    """Id of the request that computed it."""
    was_used: bool = False


class StatePool:
    """Slots 0 to num_slots - 1. A sequence holds one; a slot that nobody holds may keep a snapshot, the state behind
    the last token of a full block. Snapshots are found by the block's key, and the least recently used one makes room.

    Copies between slots are collected and made before the next step computes, so a snapshot is that of the last step.
    """

    def __init__(self, num_slots: int, tree: PrefixTree | None = None) -> None:
        """`tree`: shared with the pools of KV blocks."""
        self.num_slots = num_slots
        self._tree = PrefixTree() if tree is None else tree
        self._free = list(range(num_slots - 1, -1, -1))  # without a snapshot
        self._snapshots: OrderedDict[bytes, _Snapshot] = OrderedDict()  # least recently used first
        self._sources: dict[int, int] = {}  # by slot: the one whose present state it gets before the next step

    @property
    def num_free(self) -> int:
        """Slots that sequences may have."""
        return len(self._free) + len(self._snapshots)

    @property
    def num_held(self) -> int:
        return self.num_slots - self.num_free

    @property
    def num_snapshots(self) -> int:
        return len(self._snapshots)

    def allocate(self) -> int:
        """A slot of any content; the caller has checked `num_free`."""
        if not self._free:
            self._drop(next(iter(self._snapshots)))
        return self._free.pop()

    def free(self, slot: int) -> None:
        self._free.append(slot)

    def copy(self, source: int, target: int) -> None:
        """Before the next step, after the copies that were asked for before."""
        self._sources[target] = self._sources.get(source, source)

    def take_copies(self) -> np.ndarray | None:
        """[2, F] int64: slots to read, all before any is written, and slots to write, each once. None without any since
        the last call.
        """
        taken, self._sources = self._sources, {}
        pairs = [(source, target) for target, source in taken.items() if source != target]
        return np.array(pairs, np.int64).T if pairs else None

    def longest_hit(self, keys: Sequence[bytes], limit: int) -> int:
        """Largest number of leading blocks, at most `limit`, behind which there is a snapshot."""
        return next((hit for hit in range(limit, 0, -1) if keys[hit - 1] in self._snapshots), 0)

    def restore(self, key: bytes) -> int:
        """A slot for a sequence that goes on from the snapshot `key`."""
        snapshot = self._snapshots[key]
        snapshot.was_used = True
        self._snapshots.move_to_end(key)
        source = snapshot.slot
        slot = self.allocate()
        self.copy(source, slot)
        return slot

    def save(self, keys: Sequence[bytes], index: int, slot: int, owner: str, replaced: bytes | None = None) -> bool:
        """Keep the state of `slot`, behind the block `keys[index]`. False where there is one already, or no slot free.

        `owner`: id of the request that computed it. `replaced`: a snapshot that is given up for it, unless it was used.
        """
        key = keys[index]
        if key in self._snapshots:
            self._snapshots.move_to_end(key)
            return False
        if replaced in self._snapshots and not self._snapshots[replaced].was_used:
            self._drop(replaced)
        if not self.num_free:
            return False
        kept = self.allocate()
        self.copy(slot, kept)
        self._snapshots[key] = _Snapshot(kept, owner)
        self._tree.add(keys, index)
        return True

    def keys_of(self, owner: str) -> set[bytes]:
        return {key for key, snapshot in self._snapshots.items() if snapshot.owner == owner}

    def forget(self, keys: Collection[bytes]) -> None:
        for key in keys:
            if key in self._snapshots:
                self._drop(key)

    def forget_all(self) -> None:
        self.forget(list(self._snapshots))

    def _drop(self, key: bytes) -> None:
        self._free.append(self._snapshots.pop(key).slot)
        self._tree.remove(key)


class KnownPrefixes:
    """Keys of blocks that were computed lately, in the cache or not: where a new prompt leaves them, it parts from
    another one, and later ones may too.
    """

    def __init__(self, most: int = MAX_KNOWN_KEYS) -> None:
        self._most = most
        self._keys: OrderedDict[bytes, None] = OrderedDict()  # least recently seen first

    def add(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._most:
            self._keys.popitem(last=False)

    def longest(self, keys: Sequence[bytes], limit: int) -> int:
        """Number of leading blocks, at most `limit`, that are known."""
        found = 0
        while found < limit and keys[found] in self._keys:
            self._keys.move_to_end(keys[found])
            found += 1
        return found

    def clear(self) -> None:
        self._keys.clear()
