"""Which cached block continues which one: what has to go when a block turns out to be faulty."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class _Node:
    parent: bytes
    num_blocks: int
    """Blocks of all pools with this key."""
    children: set[bytes] | None = None


class PrefixTree:
    """Block keys and the keys that continue them. A key stays while a pool has a block with it, or a key that continues
    it is there: the blocks of a prefix may be evicted before those that were computed from them.
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
            node.num_blocks += 1
            return
        self._nodes[key] = _Node(parent, 1)
        above = self._nodes.get(parent)
        if above is not None:
            if above.children is None:
                above.children = set()
            above.children.add(key)

    def remove(self, key: bytes) -> None:
        """A block with `key` has left the cache."""
        self._nodes[key].num_blocks -= 1
        while (node := self._nodes.get(key)) is not None and not node.num_blocks and not node.children:
            del self._nodes[key]
            if node.parent in self._nodes:
                self._nodes[node.parent].children.discard(key)
            key = node.parent

    def descendants(self, keys: Iterable[bytes]) -> set[bytes]:
        """Keys that continue one of `keys`, at any distance."""
        found: set[bytes] = set()
        todo = [key for key in keys if key in self._nodes]
        while todo:
            new = (self._nodes[todo.pop()].children or set()) - found
            found |= new
            todo += new
        return found
