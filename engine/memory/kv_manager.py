"""KV memory of all sequences over all cache groups: block tables, prefix hits, allocation, release."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from fuseline.engine.memory.block_pool import NULL_BLOCK
from fuseline.engine.memory.cache_groups import CacheGroup
from fuseline.engine.memory.prefix_cache import extend_keys
from fuseline.engine.request import Sequence


class KVManager:
    """Block tables are kept as `tables` [G, R, M] int32, indexed by a running sequence's row (R: max_num_seqs)."""

    def __init__(
        self, windows: Seq[int], num_blocks: Seq[int], block_size: int, max_num_seqs: int, max_model_len: int
    ) -> None:
        self.block_size = block_size
        self.groups = [CacheGroup(w, block_size, n) for w, n in zip(windows, num_blocks, strict=True)]
        self._windowed = [(index, group) for index, group in enumerate(self.groups) if group.window]
        self.promised: dict[bytes, Sequence] = {}
        """Keys of blocks that will soon be in the cache, and the running sequence that computes each."""
        self.tables = np.zeros((len(self.groups), max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self.num_slots = np.zeros(max_num_seqs, np.int64)  # [R], tokens that the blocks of a row can hold

    @property
    def usage(self) -> float:
        """Share of blocks in use, of the fullest group."""
        return max((g.pool.num_used / g.pool.num_blocks for g in self.groups), default=0.0)

    def find_prefix(self, seq: Sequence) -> int:
        """Blocks of `seq`'s tokens that are cached in every group; at least one token is left to compute."""
        if not seq.reads_cache:
            return 0
        hit = (seq.num_tokens - 1) // self.block_size
        extend_keys(seq.keys, seq.cache_root, seq.tokens, self.block_size, hit)
        settled = False
        while not settled:
            before = hit
            for group in self.groups:
                hit = group.longest_hit(seq.keys, hit)
            settled = hit == before
        return hit

    def find_promise(self, seq: Sequence, hit: int) -> bytes | None:
        """The key of the last block that running sequences are computing for `seq` too; None: its next is its own."""
        last = None
        if seq.reads_cache:
            for key in seq.keys[hit : (seq.num_tokens - 1) // self.block_size]:
                if key not in self.promised:
                    break
                last = key
        return last

    def start(self, seq: Sequence, hit: int, num_tokens: int) -> bool:
        """Give a sequence its first `hit` blocks from the cache and see to it that it can grow to `num_tokens` tokens.

        Refused unless all of the sequence's known tokens fit, so that a long prompt is not begun only to be preempted.
        """
        reused = [group.hit_blocks(seq.keys, hit) for group in self.groups]
        for group, blocks in zip(self.groups, reused, strict=True):
            target = num_tokens if group.window else seq.num_tokens
            fresh = self._num_blocks(target) - hit
            if fresh + sum(b != NULL_BLOCK and group.pool.is_free(b) for b in blocks) > group.pool.num_free:
                return False
        for group, blocks in zip(self.groups, reused, strict=True):
            for block in blocks:
                if block != NULL_BLOCK:
                    group.pool.take(block)
        seq.blocks = reused
        seq.first_held = [group.first_visible(hit * self.block_size) for group in self.groups]
        seq.num_remembered = hit
        self._promise(seq)
        return True

    def load_table(self, seq: Sequence) -> None:
        """Its blocks as they are after `start`, once it has a row."""
        for index, blocks in enumerate(seq.blocks):
            self.tables[index, seq.row, : len(blocks)] = blocks
        self.num_slots[seq.row] = seq.num_computed

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Room for tokens up to `num_tokens`, giving back what the windows have left. False when blocks are lacking."""
        if num_tokens <= self.num_slots[seq.row]:
            return True
        self._leave_window(seq)
        end = self._num_blocks(num_tokens)
        for group, blocks in zip(self.groups, seq.blocks, strict=True):
            if end - len(blocks) > group.pool.num_free:
                return False
        for index, (group, blocks) in enumerate(zip(self.groups, seq.blocks, strict=True)):
            fresh = group.pool.allocate(end - len(blocks))
            self.tables[index, seq.row, len(blocks) : end] = fresh
            blocks.extend(fresh)
        self.num_slots[seq.row] = end * self.block_size
        return True

    def grow_streams(self, rows: np.ndarray, sequences: Seq[Sequence]) -> bool:
        """A block more for each of the rows. False, and nothing done, where that is not all there is to do."""
        if self._windowed or any(len(rows) > group.pool.num_free for group in self.groups):
            return False
        for index, group in enumerate(self.groups):
            fresh = group.pool.allocate(len(rows))
            self.tables[index, rows, self.num_slots[rows] // self.block_size] = fresh
            for seq, block in zip(sequences, fresh, strict=True):
                seq.blocks[index].append(block)
        self.num_slots[rows] += self.block_size
        return True

    def remember(self, seq: Sequence) -> None:
        """Make the blocks that the last step filled findable."""
        end = seq.num_computed // self.block_size
        if seq.cache_root is None or end <= seq.num_remembered:
            return
        extend_keys(seq.keys, seq.cache_root, seq.rows.tokens[seq.row], self.block_size, end)
        for index in range(seq.num_remembered, end):
            key = seq.keys[index]
            self.promised.pop(key, None)
            for group, blocks in zip(self.groups, seq.blocks, strict=True):
                if blocks[index] != NULL_BLOCK:
                    group.pool.remember(blocks[index], key)
        seq.num_remembered = end

    def free(self, seq: Sequence) -> None:
        """Give everything back, the last block first: a prefix outlives its continuations in the cache."""
        self._withdraw(seq)
        for group, blocks in zip(self.groups, seq.blocks, strict=False):
            for block in reversed(blocks):
                if block != NULL_BLOCK:
                    group.pool.release(block)
        seq.blocks = []
        seq.num_remembered = 0

    def reset_prefix_cache(self) -> None:
        for group in self.groups:
            group.pool.forget_all()

    def _promise(self, seq: Sequence) -> None:
        """Tell of the blocks that a starting sequence will fill with the tokens it has."""
        if seq.cache_root is None:
            return
        end = seq.num_tokens // self.block_size
        extend_keys(seq.keys, seq.cache_root, seq.tokens, self.block_size, end)
        for key in seq.keys[seq.num_remembered : end]:
            self.promised.setdefault(key, seq)

    def _withdraw(self, seq: Sequence) -> None:
        for key in seq.keys[seq.num_remembered :]:
            if self.promised.get(key) is seq:
                del self.promised[key]

    def _leave_window(self, seq: Sequence) -> None:
        for index, group in self._windowed:
            blocks = seq.blocks[index]
            first = min(group.first_visible(seq.num_computed), len(blocks))
            for position in range(seq.first_held[index], first):
                group.pool.release(blocks[position])
                blocks[position] = NULL_BLOCK
                self.tables[index, seq.row, position] = NULL_BLOCK
            seq.first_held[index] = max(first, seq.first_held[index])

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
