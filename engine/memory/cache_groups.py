"""A cache group: the layers with one window, their pool, and what the window lets a sequence leave behind."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from fuseline.engine.memory.block_pool import NULL_BLOCK, BlockPool
from fuseline.engine.memory.prefix_cache import PrefixTree


class CacheGroup:
    def __init__(self, window: int, block_size: int, num_blocks: int, tree: PrefixTree | None = None) -> None:
        self.window = window
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, tree)

    def first_visible(self, num_computed: int) -> int:
        """Index of the first block that a query at position `num_computed`, or any later one, can still see."""
        return max(0, num_computed - self.window + 1) // self.block_size if self.window else 0

    def longest_hit(self, keys: Seq[bytes], limit: int) -> int:
        """Largest number of leading blocks, at most `limit`, whose still visible part is in the cache."""
        if not self.window:
            found = 0
            while found < limit and self.pool.find(keys[found]) is not None:
                found += 1
            return found
        hit = limit
        while hit > 0:
            missing = self._last_missing(keys, self.first_visible(hit * self.block_size), hit)
            if missing < 0:
                return hit
            # No hit can end behind a missing block while the window still reaches it, so the next to try ends at it.
            hit = missing
        return 0

    def hit_blocks(self, keys: Seq[bytes], hit: int) -> list[int]:
        """Ids of the first `hit` blocks, the invisible ones null."""
        first = self.first_visible(hit * self.block_size)
        return [NULL_BLOCK] * first + [self.pool.find(keys[index]) for index in range(first, hit)]

    def _last_missing(self, keys: Seq[bytes], first: int, end: int) -> int:
        for index in range(end - 1, first - 1, -1):
            if self.pool.find(keys[index]) is None:
                return index
        return -1
