"""KV of preempted sequences in host memory: which host blocks are free, and the copies that a step begins with."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq

import numpy as np

from fuseline.compile.graph_inputs import BlockCopy
from fuseline.compile.specs import ModelInfo
from fuseline.engine.memory.sizing import GIB, SizingError
from fuseline.engine.state.sequence import SwappedKV

logger = logging.getLogger("fuseline.engine")
MOST, MUCH = 0.7, 0.4
"""Shares of this machine's memory that swap space may take at most, and may take without a warning."""


class SwapSpace:
    """Host blocks of each cache group. `copies` are those that no step has been told of yet."""

    def __init__(self, num_blocks: Seq[int]) -> None:
        self.num_blocks = tuple(num_blocks)
        self.num_sequences = 0
        self.copies: list[BlockCopy] = []
        self._free = [list(range(count - 1, -1, -1)) for count in num_blocks]

    @property
    def usage(self) -> float:
        """Share of blocks in use, of the fullest group."""
        pairs = zip(self._free, self.num_blocks, strict=True)
        return max((1 - len(free) / count for free, count in pairs if count), default=0.0)

    def save(self, num_computed: int, first: Seq[int], blocks: Seq[list[int]]) -> SwappedKV | None:
        """Copy `blocks` of the device out; None if there are not enough for all of them."""
        if any(len(part) > len(free) for part, free in zip(blocks, self._free, strict=True)):
            return None
        taken = tuple([free.pop() for _ in part] for part, free in zip(blocks, self._free, strict=True))
        self._copy(True, blocks, taken)
        self.num_sequences += 1
        return SwappedKV(num_computed, tuple(first), taken)

    def restore(self, saved: SwappedKV, targets: Seq[list[int | None]]) -> None:
        """Copy to the device's blocks `targets`, but for those that are None; what was saved is given back."""
        wanted = [
            [(to, block) for to, block in zip(part, blocks, strict=True) if to is not None]
            for part, blocks in zip(targets, saved.blocks, strict=True)
        ]
        device, host = ([[pair[side] for pair in part] for part in wanted] for side in (0, 1))
        self._copy(False, device, host)
        self.discard(saved)

    def discard(self, saved: SwappedKV) -> None:
        # Copies are made in order: whoever takes these blocks now writes them after they were read.
        for free, blocks in zip(self._free, saved.blocks, strict=True):
            free.extend(reversed(blocks))
        self.num_sequences -= 1

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """For the step that is about to be computed."""
        taken, self.copies = tuple(self.copies), []
        return taken

    def _copy(self, is_out: bool, device: Seq[list[int]], host: Seq[list[int]]) -> None:
        pairs = tuple(np.array(pair, np.int64) for pair in zip(device, host, strict=True))
        if any(pair.size for pair in pairs):
            self.copies.append(BlockCopy(is_out, pairs))


def host_blocks(info: ModelInfo, block_size: int, swap_space: float, num_blocks: Seq[int], memory: int) -> list[int]:
    """Host blocks per cache group in `swap_space` GiB, shared out as `num_blocks` are on the device.

    `memory`: bytes of this machine. Raises SizingError.
    """
    share = swap_space * GIB / memory
    if share > MOST:
        raise SizingError(f"--swap-space {swap_space} GiB is {share:.0%} of this machine's memory; {MOST:.0%} at most")
    if share > MUCH:
        logger.warning("--swap-space %s GiB is %.0f %% of this machine's memory", swap_space, 100 * share)
    specs = {spec.layer: spec for spec in info.cache_specs}
    sizes = [block_size * sum(specs[layer].bytes_per_token() for layer in group.layers) for group in info.cache_groups]
    whole = sum(count * size for count, size in zip(num_blocks, sizes, strict=True))
    return [int(count * min(1.0, swap_space * GIB / whole)) for count in num_blocks]
