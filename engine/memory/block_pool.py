"""Blocks of one cache group: who holds them, what they are known to contain, which one is reused next."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Sequence

from fuseline.engine.memory.prefix_cache import PrefixTree

NULL_BLOCK = 0
"""Stands where a table needs an id and no block is wanted; never handed out."""


class BlockPool:
    """`num_blocks` usable blocks with ids 1..num_blocks.

    A block is free when nobody holds it; a free block keeps its key, and can be found again, until it is reused. Free
    blocks are reused in the order: never keyed, then least recently released.
    """

    def __init__(self, num_blocks: int, tree: PrefixTree | None = None) -> None:
        """`tree`: shared by the pools of all cache groups."""
        self.num_blocks = num_blocks
        self._tree = PrefixTree() if tree is None else tree
        self.refs = [0] * (num_blocks + 1)
        self._keys: list[bytes | None] = [None] * (num_blocks + 1)
        self._owners: list[str] = [""] * (num_blocks + 1)  # ids of the requests that committed them
        self._cached: dict[bytes, int] = {}
        self._filled = [0.0] * (num_blocks + 1)  # when a block got the content that it keeps; 0: it has none
        self.lifetimes: list[float] = []
        """Seconds for which blocks have kept their content, one entry for each that has lost it."""
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def find(self, key: bytes) -> int | None:
        return self._cached.get(key)

    def is_free(self, block: int) -> bool:
        return self.refs[block] == 0

    def take(self, block: int) -> None:
        """Hold a cached block once more."""
        if self.refs[block] == 0:
            del self._free[block]
        self.refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks without content; the caller has checked `num_free`."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        now = time.monotonic()
        for block in blocks:
            self._forget(block)
            self.refs[block] = 1
            self._filled[block] = now
        return blocks

    def release(self, block: int) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self._free[block] = None
            if self._keys[block] is None:
                self._end_life(block)
                self._free.move_to_end(block, last=False)

    def commit(self, block: int, keys: Sequence[bytes], index: int, owner: str) -> None:
        """Make a full block findable, by `keys[index]`. The first block with a key keeps it while somebody holds it.

        `keys`: those of the blocks before it come before. `owner`: id of the request that computed it.
        """
        key = keys[index]
        other = self._cached.get(key)
        if other is not None and other != block and self.is_free(other):
            # Computed again for want of a recurrent state: the newer one is held, and released later.
            self._forget(other)
            self._free.move_to_end(other, last=False)
        if self._keys[block] is None and key not in self._cached:
            self._keys[block] = key
            self._cached[key] = block
            self._owners[block] = owner
            self._tree.add(keys, index)

    def keys_of(self, owner: str) -> set[bytes]:
        """Keys of the cached blocks that a request has committed. Goes through all blocks: it is asked for faults."""
        return {self._keys[block] for block, one in enumerate(self._owners) if one == owner}

    def forget(self, keys: Collection[bytes]) -> None:
        """Blocks with one of the keys are no longer found."""
        for key in keys:
            if key in self._cached:
                self._forget(self._cached[key])

    def forget_all(self) -> None:
        for block in list(self._cached.values()):
            self._forget(block)

    def _end_life(self, block: int) -> None:
        """Nobody holds or finds the content any more."""
        if self._filled[block]:
            self.lifetimes.append(time.monotonic() - self._filled[block])
            self._filled[block] = 0.0

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            if self.refs[block] == 0:
                self._end_life(block)
            del self._cached[key]
            self._keys[block] = None
            self._owners[block] = ""
            self._tree.remove(key)
