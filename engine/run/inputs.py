"""Builds a step's GraphInputs from the plan, in arrays that are reused from step to step."""

from __future__ import annotations

import numpy as np
import torch

from fuseline.compile.graph_inputs import GraphInputs
from fuseline.compile.specs import RopeSwitchSpec
from fuseline.engine.run.request_rows import RequestRows
from fuseline.engine.schedule.plan import Plan


class InputBuilder:
    """Legend as in GraphInputs. The tensors of one step are overwritten by the next."""

    def __init__(
        self,
        rows: RequestRows,
        num_groups: int,
        block_size: int,
        max_num_tokens: int,
        rope_switch: RopeSwitchSpec | None,
    ) -> None:
        self.rows = rows
        self.block_size = block_size
        self.rope_switch = rope_switch
        num_seqs = rows.tokens.shape[0]
        self._token_ids = np.zeros(max_num_tokens, np.int64)
        self._positions = np.zeros(max_num_tokens, np.int64)
        self._rope_rows = np.zeros(max_num_tokens, np.int64)
        self._slots = np.zeros(num_groups * max_num_tokens, np.int64)
        self._query_start = np.zeros(num_seqs + 1, np.int32)
        self._seq_lens = np.zeros(num_seqs, np.int32)
        self._tables = np.zeros(0, np.int32)

    def build(self, plan: Plan, logits_rows: np.ndarray) -> GraphInputs:
        num_seqs, num_groups = len(plan.sequences), plan.tables.shape[0]
        seq_rows = np.fromiter((s.row for s in plan.sequences), np.int64, num_seqs)
        computed = np.fromiter((s.num_computed for s in plan.sequences), np.int64, num_seqs)
        counts = np.asarray(plan.counts, np.int64)
        query_start = self._query_start[: num_seqs + 1]
        np.cumsum(counts, out=query_start[1:])
        num_tokens = int(query_start[num_seqs])
        seq_lens = self._seq_lens[:num_seqs]
        seq_lens[:] = computed + counts

        token_rows = np.repeat(seq_rows, counts)
        positions = self._positions[:num_tokens]
        positions[:] = np.arange(num_tokens)
        positions += np.repeat(computed - query_start[:-1], counts)
        token_ids = self._token_ids[:num_tokens]
        token_ids[:] = self.rows.tokens[token_rows, positions]
        slots = self._slots[: num_groups * num_tokens].reshape(num_groups, num_tokens)
        slots[:] = plan.tables[:, token_rows, positions // self.block_size]
        slots *= self.block_size
        slots += positions % self.block_size
        return GraphInputs(
            token_ids=torch.from_numpy(token_ids),
            positions=torch.from_numpy(positions),
            rope_rows=torch.from_numpy(self._fill_rope_rows(plan, positions, counts)),
            query_start=torch.from_numpy(query_start),
            seq_lens=torch.from_numpy(seq_lens),
            slot_mapping=torch.from_numpy(slots),
            block_tables=torch.from_numpy(self._fill_tables(plan, seq_rows, int(seq_lens.max()))),
            logits_rows=torch.from_numpy(logits_rows),
        )

    def _fill_rope_rows(self, plan: Plan, positions: np.ndarray, counts: np.ndarray) -> np.ndarray:
        if self.rope_switch is None:
            return positions
        variants = np.fromiter((s.variant for s in plan.sequences), np.int64, len(plan.sequences))
        rope_rows = self._rope_rows[: len(positions)]
        np.add(positions, np.repeat(variants * self.rope_switch.table_rows, counts), out=rope_rows)
        return rope_rows

    def _fill_tables(self, plan: Plan, seq_rows: np.ndarray, longest: int) -> np.ndarray:
        num_groups = plan.tables.shape[0]
        width = -(-longest // self.block_size)
        size = num_groups * len(seq_rows) * width
        if size > len(self._tables):
            self._tables = np.zeros(2 * size, np.int32)
        tables = self._tables[:size].reshape(num_groups, len(seq_rows), width)
        tables[:] = plan.tables[:, seq_rows, :width]
        return tables
