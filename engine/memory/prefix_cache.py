"""Parent links between cached blocks: they give the blocks to drop when one is faulty."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Node:
    parent: bytes
    """Empty for the first block of a sequence."""
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

    def add(self, keys: Sequence[bytes], index: int) -> None:
        """A block with the key `keys[index]` is committed. Its KV was computed from those with the keys before its own,
        which need not be in the cache.
        """
        node = self._nodes.get(keys[index])
        if node is not None:
            node.num_blocks += 1
            return
        self._nodes[keys[index]] = _Node(keys[index - 1] if index else b"", 1)
        while index:
            above = self._nodes.get(keys[index - 1])
            is_known = above is not None
            if above is None:
                above = self._nodes[keys[index - 1]] = _Node(keys[index - 2] if index > 1 else b"", 0)
            if above.children is None:
                above.children = set()
            above.children.add(keys[index])
            if is_known:
                return
            index -= 1

    def remove(self, key: bytes) -> None:
        """A block with `key` has left the cache."""
        self._nodes[key].num_blocks -= 1
        while key and not (node := self._nodes[key]).num_blocks and not node.children:
            del self._nodes[key]
            if node.parent:
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
