"""Which cached block continues which one: what has to go when a block turns out to be faulty."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(slots=True)
class _Node:
    parent: bytes
    num_uses: int
    """Blocks of all pools with this key, and keys that continue it."""


class PrefixTree:
    """Parents of block keys. A key stays while a pool has a block with it, or a key that continues it is there: the
    blocks of a prefix may be evicted before those that were computed from them.
    """

    def __init__(self) -> None:
        self._nodes: dict[bytes, _Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def add(self, key: bytes, parent: bytes) -> None:
        """A block with `key` is committed; its KV was computed from the block with the key `parent`, or `parent` is the
        root of its chain.
        """
        node = self._nodes.get(key)
        if node is not None:
            node.num_uses += 1
            return
        self._nodes[key] = _Node(parent, 1)
        if parent in self._nodes:
            self._nodes[parent].num_uses += 1

    def remove(self, key: bytes) -> None:
        """A block with `key` has left the cache."""
        while (node := self._nodes.get(key)) is not None:
            node.num_uses -= 1
            if node.num_uses:
                return
            del self._nodes[key]
            key = node.parent

    def descendants(self, keys: Collection[bytes]) -> set[bytes]:
        """Keys that continue one of `keys`, at any distance."""
        is_below: dict[bytes, bool] = {}
        for key in self._nodes:
            path = []
            while key in self._nodes and key not in is_below:
                path.append(key)
                key = self._nodes[key].parent
            for key in reversed(path):
                parent = self._nodes[key].parent
                is_below[key] = parent in keys or is_below.get(parent, False)
        return {key for key, answer in is_below.items() if answer}
