"""Cache memory of all sequences: block tables, prefix hits and allocation over all cache groups, recurrent states."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from fuseline.engine.memory.block_pool import NULL_BLOCK
from fuseline.engine.memory.cache_groups import CacheGroup
from fuseline.engine.memory.prefix_cache import PrefixTree
from fuseline.engine.memory.state_pool import KnownPrefixes, StatePool
from fuseline.engine.memory.swap import SwapSpace
from fuseline.engine.state.block_keys import extend_keys
from fuseline.engine.state.sequence import Sequence


class KVManager:
    """Block tables are kept as `tables` [G, R, M] int32, indexed by a running sequence's row (R: max_num_seqs)."""

    def __init__(
        self,
        windows: Seq[int],
        num_blocks: Seq[int],
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        num_host_blocks: Seq[int] = (),
        num_states: int = 0,
    ) -> None:
        """`num_states`: slots of recurrent states, snapshots included; 0 for a model without. Such states are not
        swapped.
        """
        self.block_size = block_size
        self._tree = PrefixTree()
        self.groups = [CacheGroup(w, block_size, n, self._tree) for w, n in zip(windows, num_blocks, strict=True)]
        self.states = StatePool(num_states, self._tree) if num_states else None
        self._known = KnownPrefixes()
        self.swap = SwapSpace(num_host_blocks) if num_host_blocks and not num_states else None
        self._epoch = 0
        self._windowed = [(index, group) for index, group in enumerate(self.groups) if group.window]
        self._forks: list[list[tuple[int, int]]] = [[] for _ in self.groups]
        self.in_flight: dict[bytes, Sequence] = {}
        """Keys of blocks that will soon be in the cache, and the running sequence that computes each."""
        self.tables = np.zeros((len(self.groups), max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self.num_slots = np.zeros(max_num_seqs, np.int64)  # [R], tokens that the blocks of a row can hold

    @property
    def usage(self) -> float:
        """Share of blocks in use of the fullest group, or of the states that sequences can have if that is more."""
        blocks = max((g.pool.num_used / g.pool.num_blocks for g in self.groups), default=0.0)
        if self.states is None:
            return blocks
        return max(blocks, self.states.num_held / min(self.states.num_slots, len(self.num_slots)))

    def take_lifetimes(self) -> tuple[float, ...]:
        """Seconds for which blocks of all groups have kept their content that have lost it since the last call."""
        taken = tuple(seconds for group in self.groups for seconds in group.pool.lifetimes)
        if taken:
            for group in self.groups:
                group.pool.lifetimes.clear()
        return taken

    def find_prefix(self, seq: Sequence) -> int:
        """Blocks of `seq`'s tokens that are cached in every group, with a snapshot of the state behind them where the
        model has states; at least one token is left to compute.
        """
        if not seq.reads_cache:
            return 0
        hit = (seq.num_tokens - 1) // self.block_size
        self._extend_keys(seq, hit)
        settled = False
        while not settled:
            before = hit
            for group in self.groups:
                hit = group.longest_hit(seq.keys, hit)
            if self.states:
                hit = self.states.longest_hit(seq.keys, hit)
            settled = hit == before
        return hit

    def find_in_flight(self, seq: Sequence, hit: int) -> bytes | None:
        """Key of the last block that running sequences compute for `seq` too; None when nobody computes its next. With
        states it need not be the next: blocks before it may be computed already.
        """
        keys = seq.keys[hit : (seq.num_tokens - 1) // self.block_size] if seq.reads_cache else []
        if self.states:
            return next((key for key in reversed(keys) if key in self.in_flight), None)
        last = None
        for key in keys:
            if key not in self.in_flight:
                break
            last = key
        return last

    def find_start(self, seq: Sequence) -> int:
        """Tokens of a waiting sequence that need no computing: they are in the prefix cache, or were swapped out."""
        return seq.swapped.num_computed if seq.swapped else self.find_prefix(seq) * self.block_size

    def choose_borders(self, seq: Sequence, num_computed: int) -> None:
        """Choose where the state of a waiting sequence, which starts behind `num_computed` tokens, is kept: behind the
        last block of its prompt that others can take over, and where its prompt parts from those that are known.
        """
        seq.borders = []
        if self.states is None or seq.cache_root is None:
            return
        end = (seq.prompt_len - 1) // self.block_size
        shared = self._known.longest(seq.keys, min(end, len(seq.keys))) if seq.reads_cache else 0
        seq.borders = [n * self.block_size for n in {shared, end} if n * self.block_size > num_computed]

    def start(self, seq: Sequence, num_computed: int, num_tokens: int) -> bool:
        """Give a sequence the blocks of its first `num_computed` tokens, as `find_start` has them.

        It can grow to `num_tokens` tokens then. Refused unless all of its known tokens fit, so that a long prompt is
        not begun only to be preempted.
        """
        if seq.swapped:
            return self._swap_in(seq, num_tokens)
        hit = num_computed // self.block_size
        reused = [group.hit_blocks(seq.keys, hit) for group in self.groups]
        for group, blocks in zip(self.groups, reused, strict=True):
            target = num_tokens if group.window else seq.num_tokens
            fresh = self._num_blocks(target) - hit
            if fresh + sum(b != NULL_BLOCK and group.pool.is_free(b) for b in blocks) > group.pool.num_free:
                return False
        if self.states and not self.states.num_free:
            return False
        for group, blocks in zip(self.groups, reused, strict=True):
            for block in blocks:
                if block != NULL_BLOCK:
                    group.pool.take(block)
        if self.states:
            seq.state_slot = self.states.restore(seq.keys[hit - 1]) if hit else self.states.allocate()
        seq.blocks = reused
        seq.first_held = [group.first_visible(hit * self.block_size) for group in self.groups]
        seq.num_committed, seq.cache_epoch = hit, self._epoch
        self._add_in_flight(seq)
        return True

    def load_table(self, seq: Sequence) -> None:
        """Its blocks as they are after `start`, once it has a row."""
        for index, blocks in enumerate(seq.blocks):
            self.tables[index, seq.row, : len(blocks)] = blocks
        self.num_slots[seq.row] = self._num_blocks(seq.num_computed) * self.block_size

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Hold blocks for `num_tokens` tokens and give back those behind the windows. False when blocks are lacking."""
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

    def fork(self, parent: Sequence, child: Sequence, num_computed: int) -> bool:
        """Give `child` the KV of the parent's first `num_computed` tokens: full blocks are shared, the last one is
        copied before the next step computes, and so is the recurrent state, which is that of all tokens that the parent
        has computed. False when a block or a slot is lacking.
        """
        full, is_partial = divmod(num_computed, self.block_size)
        if is_partial and any(not group.pool.num_free for group in self.groups):
            return False
        if self.states and not self.states.num_free:
            return False
        if self.states:
            child.state_slot = self.states.allocate()
            self.states.copy(parent.state_slot, child.state_slot)
        child.blocks = []
        for index, (group, blocks) in enumerate(zip(self.groups, parent.blocks, strict=True)):
            for block in blocks[:full]:
                if block != NULL_BLOCK:
                    group.pool.take(block)
            fresh = group.pool.allocate(1) if is_partial else []
            self._forks[index] += [(blocks[full], block) for block in fresh]
            child.blocks.append(blocks[:full] + fresh)
        child.first_held = list(parent.first_held)
        child.num_committed, child.cache_epoch = min(parent.num_committed, full), parent.cache_epoch
        child.keys = parent.keys[:full]
        return True

    def take_forks(self) -> tuple[np.ndarray, ...]:
        """[2, F] by cache group: blocks to copy, and those to copy them to; none since the last call: ()."""
        if not any(self._forks):
            return ()
        taken, self._forks = self._forks, [[] for _ in self.groups]
        return tuple(np.array(pairs, np.int64).reshape(-1, 2).T for pairs in taken)

    def take_state_copies(self) -> np.ndarray | None:
        """As `StatePool.take_copies` has them."""
        return self.states.take_copies() if self.states else None

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """Make the blocks of the first `num_tokens` tokens findable: they are known, and computed by a started step,
        the last one, behind which the state may be kept.
        """
        end = num_tokens // self.block_size
        if seq.cache_root is None or seq.cache_epoch != self._epoch or end <= seq.num_committed:
            return
        extend_keys(seq.keys, seq.cache_root, seq.rows.tokens[seq.row], self.block_size, end, seq.embeds)
        for index in range(seq.num_committed, end):
            self.in_flight.pop(seq.keys[index], None)
            for group, blocks in zip(self.groups, seq.blocks, strict=True):
                if blocks[index] != NULL_BLOCK:
                    group.pool.commit(blocks[index], seq.keys, index, seq.request.request_id)
        if self.states:
            self._keep_state(seq, num_tokens)
        seq.num_committed = end

    def free(self, seq: Sequence) -> None:
        """Give everything back, the last block first: a prefix outlives its continuations in the cache."""
        self._drop_in_flight(seq)
        for group, blocks in zip(self.groups, seq.blocks, strict=False):
            for block in reversed(blocks):
                if block != NULL_BLOCK:
                    group.pool.release(block)
        seq.blocks = []
        seq.num_committed = 0
        if seq.state_slot >= 0:
            self.states.free(seq.state_slot)
            seq.state_slot, seq.newest_snapshot = -1, None

    def swap_out(self, seq: Sequence) -> bool:
        """Save the KV of a running sequence that is about to lose its row. False when the host lacks blocks for it."""
        num_computed = seq.num_settled
        if self.swap is None or num_computed == 0 or seq.pools_mean:
            return False
        first = [group.first_visible(num_computed) for group in self.groups]
        end = self._num_blocks(num_computed)
        visible = [blocks[begin:end] for begin, blocks in zip(first, seq.blocks, strict=True)]
        seq.swapped = self.swap.save(num_computed, first, visible)
        return seq.swapped is not None

    def discard_swapped(self, seq: Sequence) -> None:
        """A sequence that does not go on, or is computed anew."""
        if seq.swapped:
            self.swap.discard(seq.swapped)
            seq.swapped = None

    def reset_prefix_cache(self) -> None:
        """Running sequences go on, but what they compute from now on depends on what is forgotten: it is not found."""
        self._epoch += 1
        self.in_flight.clear()
        for group in self.groups:
            group.pool.forget_all()
        if self.states:
            self.states.forget_all()
            self._known.clear()

    def forget_request(self, request_id: str) -> set[bytes]:
        """The blocks and states that a request has committed leave the prefix cache, and those computed from them,
        whoever did it.

        Returns their keys: sequences that have one of them must not commit any more (`stop_commits`).
        """
        pools = [group.pool for group in self.groups] + ([self.states] if self.states else [])
        faulty = set().union(*(pool.keys_of(request_id) for pool in pools))
        if faulty:
            faulty |= self._tree.descendants(faulty)
        for pool in pools:
            pool.forget(faulty)
        return faulty

    def stop_commits(self, seq: Sequence) -> None:
        """Others do not find what the sequence computes until it is started anew."""
        self._drop_in_flight(seq)
        seq.cache_epoch = -1

    def _keep_state(self, seq: Sequence, num_tokens: int) -> None:
        """Take a snapshot of the state behind `num_tokens` tokens where one is wanted. Behind the prompt that is at
        every border, for a conversation that goes on from there, in place of the last one.
        """
        index = num_tokens // self.block_size - 1
        if seq.shares_prefix:
            self._known.add(seq.keys[seq.num_committed : index + 1])
        if num_tokens % self.block_size:
            return
        if num_tokens in seq.borders:
            seq.borders.remove(num_tokens)
            self.states.save(seq.keys, index, seq.state_slot, seq.request.request_id)
        elif num_tokens >= seq.prompt_len and seq.shares_prefix and seq.group is None:
            replaced = seq.newest_snapshot
            is_kept = self.states.save(seq.keys, index, seq.state_slot, seq.request.request_id, replaced)
            seq.newest_snapshot = seq.keys[index] if is_kept else None

    def _swap_in(self, seq: Sequence, num_tokens: int) -> bool:
        """`start` of a swapped sequence. Blocks that the prefix cache still holds are not copied; those that are copied
        can be found again, by who computes in the same step too: its copies come first."""
        saved = seq.swapped
        num_full = saved.num_computed // self.block_size
        if seq.cache_root is not None:
            self._extend_keys(seq, num_full)
        found = [
            [group.pool.find(key) for key in seq.keys[first:num_full]]
            for group, first in zip(self.groups, saved.first, strict=True)
        ]
        for group, first, cached in zip(self.groups, saved.first, found, strict=True):
            blocks = [block for block in cached if block is not None]
            fresh = self._num_blocks(num_tokens if group.window else seq.num_tokens) - first - len(blocks)
            if fresh + sum(map(group.pool.is_free, blocks)) > group.pool.num_free:
                return False
        targets = []
        seq.blocks = []
        for group, first, cached, host in zip(self.groups, saved.first, found, saved.blocks, strict=True):
            for block in cached:
                if block is not None:
                    group.pool.take(block)
            cached = cached + [None] * (len(host) - len(cached))
            fresh = iter(group.pool.allocate(cached.count(None)))
            blocks = [next(fresh) if block is None else block for block in cached]
            targets.append([None if old is not None else new for old, new in zip(cached, blocks, strict=True)])
            seq.blocks.append([NULL_BLOCK] * first + blocks)
            if seq.cache_epoch == self._epoch:
                for index in range(first, min(num_full, len(seq.keys))):
                    group.pool.commit(blocks[index - first], seq.keys, index, seq.request.request_id)
        self.swap.restore(saved, targets)
        seq.swapped = None
        seq.first_held = list(saved.first)
        seq.num_committed = num_full
        self._add_in_flight(seq)
        return True

    def _add_in_flight(self, seq: Sequence) -> None:
        """Tell of the blocks that a starting sequence will fill with the tokens it has."""
        if seq.cache_root is None or seq.cache_epoch != self._epoch:
            return
        end = seq.num_tokens // self.block_size
        self._extend_keys(seq, end)
        for key in seq.keys[seq.num_committed : end]:
            self.in_flight.setdefault(key, seq)

    def _drop_in_flight(self, seq: Sequence) -> None:
        for key in seq.keys[seq.num_committed :]:
            if self.in_flight.get(key) is seq:
                del self.in_flight[key]

    def _leave_window(self, seq: Sequence) -> None:
        for index, group in self._windowed:
            blocks = seq.blocks[index]
            first = min(group.first_visible(seq.num_settled), len(blocks))
            for position in range(seq.first_held[index], first):
                group.pool.release(blocks[position])
                blocks[position] = NULL_BLOCK
                self.tables[index, seq.row, position] = NULL_BLOCK
            seq.first_held[index] = max(first, seq.first_held[index])

    def _extend_keys(self, seq: Sequence, num_blocks: int) -> None:
        extend_keys(seq.keys, seq.cache_root, seq.tokens, self.block_size, num_blocks, seq.embeds)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
