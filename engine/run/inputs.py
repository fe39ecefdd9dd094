"""Builds a step's StepInputs from the scheduled batch, in arrays that are reused from step to step."""

from __future__ import annotations

import numpy as np
import torch

from fuseline.compile.graph_inputs import StepInputs
from fuseline.compile.specs import RopeSwitchSpec
from fuseline.engine.memory.kv_manager import KVManager
from fuseline.engine.state.rows import RequestRows
from fuseline.engine.state.scheduled_batch import ScheduledBatch


class InputBuilder:
    """Legend as in StepInputs. The tensors of one step are overwritten by the next.

    `build` leaves out the token ids: `fill_tokens` puts in those that are known when the step is launched.
    """

    def __init__(
        self, rows: RequestRows, kv: KVManager, max_num_tokens: int, rope_switch: RopeSwitchSpec | None
    ) -> None:
        self.rows = rows
        self.block_size = kv.block_size
        self.kv = kv
        self.rope_switch = rope_switch
        num_seqs, num_groups = len(rows.sequences), len(kv.groups)
        self._token_ids = np.zeros(max_num_tokens, np.int64)
        self._token_rows = np.zeros(0, np.int64)
        self._positions = np.zeros(max_num_tokens, np.int64)
        self._rope_rows = np.zeros(max_num_tokens, np.int64)
        self._slots = np.zeros(num_groups * max_num_tokens, np.int64)
        self._query_start = np.zeros(num_seqs + 1, np.int32)
        self._seq_lens = np.zeros(num_seqs, np.int32)
        self._tables = TableCopy(kv)

    def build(self, batch: ScheduledBatch, more_rows: np.ndarray) -> StepInputs:
        """`more_rows`: tokens of the step, behind those that sample, whose outputs are wanted."""
        num_seqs, num_tokens = len(batch.rows), batch.num_tokens
        query_start = self._query_start[: num_seqs + 1]
        np.cumsum(batch.num_new, out=query_start[1:])
        seq_lens = self._seq_lens[:num_seqs]
        np.add(batch.num_computed, batch.num_new, out=seq_lens, casting="unsafe")

        self._token_rows = token_rows = np.repeat(batch.rows, batch.num_new)
        positions = self._positions[:num_tokens]
        positions[:] = np.arange(num_tokens)
        positions += np.repeat(batch.num_computed - query_start[:-1], batch.num_new)
        sampled_rows = query_start[batch.sampling + 1] - 1
        if batch.num_drafts is not None:
            sampled_rows = query_start[batch.sampling] + batch.lengths - 1 - batch.num_computed[batch.sampling]
        logits_rows = np.concatenate((sampled_rows, more_rows), dtype=np.int64)
        embed_rows, embeds = self._embeds(batch) if self.rows.num_embedded else (None, None)
        return StepInputs(
            token_ids=torch.from_numpy(self._token_ids[:num_tokens]),
            positions=torch.from_numpy(positions),
            rope_rows=torch.from_numpy(self._fill_rope_rows(batch, positions)),
            query_start=torch.from_numpy(query_start),
            seq_lens=torch.from_numpy(seq_lens),
            slot_mapping=torch.from_numpy(self._fill_slots(token_rows, positions)),
            block_tables=torch.from_numpy(self._tables.update(batch, int(seq_lens.max()))),
            logits_rows=torch.from_numpy(logits_rows),
            state_slots=torch.from_numpy(self.rows.state_slot[batch.rows]) if self.kv.states else None,
            embed_rows=embed_rows,
            embeds=embeds,
        )

    def fill_tokens(self) -> None:
        num_tokens = len(self._token_rows)
        self._token_ids[:num_tokens] = self.rows.tokens[self._token_rows, self._positions[:num_tokens]]

    def sources(self, batch: ScheduledBatch, sampled_at: np.ndarray) -> torch.Tensor:
        """[T] int32, as StepInputs has them. sampled_at [rows]: where the step before samples for a row."""
        rows, positions = self._token_rows, self._positions[: len(self._token_rows)]
        num_known = self.rows.num_known[rows]
        if batch.num_drafts is not None:
            num_known += np.repeat(batch.num_drafts, batch.num_new)
        is_unknown = positions >= num_known
        return torch.from_numpy(np.where(is_unknown, sampled_at[rows], -1).astype(np.int32))

    def _embeds(self, batch: ScheduledBatch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(tokens of the step [E], their embeddings [E, hidden size]); None without any in this step."""
        places, parts = [], []
        for index in np.flatnonzero(self.rows.has_embeds[batch.rows]).tolist():
            first = int(batch.num_computed[index])
            begin, end = int(self._query_start[index]), int(self._query_start[index + 1])
            for span in self.rows.sequences[batch.rows[index]].request.embeds:
                low, high = max(span.start, first), min(span.start + span.count, first + end - begin)
                if low < high:
                    data = np.frombuffer(span.data, np.float32).reshape(span.count, -1)
                    places.append(np.arange(low, high) - first + begin)
                    parts.append(data[low - span.start : high - span.start])
        if not places:
            return None, None
        return torch.from_numpy(np.concatenate(places)), torch.from_numpy(np.concatenate(parts))

    def _fill_slots(self, token_rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        num_groups, num_tokens = len(self.kv.groups), len(positions)
        slots = self._slots[: num_groups * num_tokens].reshape(num_groups, num_tokens)
        slots[:] = self.kv.tables[:, token_rows, positions // self.block_size]
        slots *= self.block_size
        slots += positions % self.block_size
        return slots

    def _fill_rope_rows(self, batch: ScheduledBatch, positions: np.ndarray) -> np.ndarray:
        if self.rope_switch is None:
            return positions
        rope_rows = self._rope_rows[: len(positions)]
        offsets = self.rows.variant[batch.rows] * self.rope_switch.table_rows
        np.add(positions, np.repeat(offsets, batch.num_new), out=rope_rows)
        return rope_rows


class TableCopy:
    """The block tables of a step's sequences, side by side. Only what has changed since the last step is copied."""

    def __init__(self, kv: KVManager) -> None:
        self.kv = kv
        self._memory = np.zeros(0, np.int32)
        self._tables = self._memory.reshape(len(kv.groups), 0, 0)  # [G, S, M]
        self._rows = self._generation = self._num_blocks = np.zeros(0, np.int64)  # [S], what was copied

    def update(self, batch: ScheduledBatch, longest: int) -> np.ndarray:
        """Tables [G, S, M] of the batch's rows, wide enough for `longest` tokens."""
        width = self._width(longest)
        # A sequence may hold more than is computed now: blocks for drafts that were not kept.
        num_blocks = np.minimum(self.kv.num_slots[batch.rows] // self.kv.block_size, width)
        if self._tables.shape[1:] != (len(batch.rows), width):
            self._resize(len(batch.rows), width)
        is_same = (batch.rows == self._rows) & (batch.generation == self._generation)
        begins = np.where(is_same, self._num_blocks, 0)
        num_new = num_blocks - begins
        grown = (num_new == 1).nonzero()[0]
        self._tables[:, grown, begins[grown]] = self.kv.tables[:, batch.rows[grown], begins[grown]]
        for index in (num_new > 1).nonzero()[0].tolist():
            part = slice(begins[index], num_blocks[index])
            self._tables[:, index, part] = self.kv.tables[:, batch.rows[index], part]
        self._rows, self._generation, self._num_blocks = batch.rows, batch.generation, num_blocks
        return self._tables

    def _width(self, longest: int) -> int:
        """Blocks, rounded up so that it seldom changes: to a power of two, from 32 on to a multiple of 32."""
        blocks = -(-longest // self.kv.block_size)
        width = 1 << (blocks - 1).bit_length() if blocks <= 32 else -(-blocks // 32) * 32
        return min(width, self.kv.tables.shape[2])

    def _resize(self, num_rows: int, width: int) -> None:
        """Nothing is kept. Entries behind a sequence's blocks may be any valid id, so old ones may stay."""
        num_groups = len(self.kv.groups)
        size = num_groups * num_rows * width
        if size > len(self._memory):
            self._memory = np.zeros(2 * size, np.int32)
        self._tables = self._memory[:size].reshape(num_groups, num_rows, width)
        self._rows = np.full(num_rows, -1)
        self._generation = self._num_blocks = np.zeros(num_rows, np.int64)
