"""Tiles of rows: whose they are (sequences, experts, each with a run of rows of its own), in which order they run."""

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


@triton.jit
def in_groups(SIZE: tl.constexpr):
    """(tile, part) of this program of a grid [tiles, parts], as `grouped` orders them."""
    tiles = tl.num_programs(0)
    return grouped(tl.program_id(1) * tiles + tl.program_id(0), tiles, tl.num_programs(1), SIZE)


@triton.jit
def grouped(nth, tiles, parts, SIZE: tl.constexpr):
    """(tile, part) of the nth of tiles x parts. SIZE tiles go over all parts together, so that what is read of both is
    still in the second-level cache when a neighbour wants it."""
    of_group = SIZE * parts
    first = nth // of_group * SIZE
    height = tl.minimum(tiles - first, SIZE)
    within = nth % of_group
    return first + within % height, within // height
