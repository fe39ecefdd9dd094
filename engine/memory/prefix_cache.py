"""Parent links between cached blocks: they give the blocks to drop when one is faulty."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PrefixTree:
    """Block keys and the keys that continue them. A key stays while a pool has a block with it, or a key that continues
    it is there: the blocks of a prefix may be evicted before those that were computed from them.

    Every step adds keys, and only a faulty request asks for descendants: links lead upwards, and are followed downwards
    by going through all of them.
    """

    def __init__(self) -> None:
        self._parents: dict[bytes, bytes] = {}
        """Empty for the first block of a sequence."""
        self._uses: dict[bytes, int] = {}
        """Blocks of all pools with the key, and keys that continue it."""

    def __len__(self) -> int:
        return len(self._parents)

    def add(self, keys: Sequence[bytes], index: int) -> None:
        """A block with the key `keys[index]` is committed. Its KV was computed from those with the keys before its own,
        which need not be in the cache.
        """
        parents, uses = self._parents, self._uses
        while (key := keys[index]) not in parents:
            uses[key] = 1
            if not index:
                parents[key] = b""
                return
            parents[key] = keys[index - 1]
            index -= 1
        uses[key] += 1

    def remove(self, key: bytes) -> None:
        """A block with `key` has left the cache."""
        while key:
            self._uses[key] -= 1
            if self._uses[key]:
                return
            del self._uses[key]
            key = self._parents.pop(key)

    def descendants(self, keys: Iterable[bytes]) -> set[bytes]:
        """Keys that continue one of `keys`, at any distance."""
        children: dict[bytes, list[bytes]] = {}
        for key, parent in self._parents.items():
            children.setdefault(parent, []).append(key)
        found: set[bytes] = set()
        todo = list(keys)
        while todo:
            new = [key for key in children.get(todo.pop(), ()) if key not in found]
            found.update(new)
            todo += new
        return found
