"""Places buffers in one arena so that buffers with overlapping lifetimes never overlap in memory."""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENT = 64


@dataclass
class Buffer:
    """Memory of one lowered value, live from step `first` through step `last`."""

    num_bytes: int
    first: int
    last: int
    offset: int = -1


def place(buffers: list[Buffer]) -> int:
    """Sets every offset; returns the arena's size in bytes. Largest first, each at the lowest free offset."""
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: -b.num_bytes):
        size = -(-buffer.num_bytes // ALIGNMENT) * ALIGNMENT
        rivals = sorted(
            (b for b in placed if b.first <= buffer.last and buffer.first <= b.last), key=lambda b: b.offset
        )
        offset = 0
        for rival in rivals:
            if rival.offset - offset >= size:
                break
            offset = max(offset, rival.offset + -(-rival.num_bytes // ALIGNMENT) * ALIGNMENT)
        buffer.offset = offset
        placed.append(buffer)
    return max((b.offset + -(-b.num_bytes // ALIGNMENT) * ALIGNMENT for b in placed), default=0)
