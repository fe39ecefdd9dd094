"""Tiles of rows that belong to several owners (sequences, experts), each with a run of rows of its own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def owner_of_tile(starts, tile, num_owners, SIZE: tl.constexpr):
    """(owner, its first tile): the rows of owner s, from starts[s] on, begin at tile starts[s] // SIZE + s.

    That leaves room for the rows of all, so that the grid follows from their number alone: rows // SIZE + owners.
    """
    low = 0
    high = num_owners
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // SIZE + middle <= tile:
            low = middle
        else:
            high = middle
    return low, tl.load(starts + low) // SIZE + low
