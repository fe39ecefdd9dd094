"""Prompts by FlashInfer, which plans a step on the host: from the arrays that the host has anyway, asking no device.

A plan is one of a step and of a kind of layer. It is kept by the thread that made it: graphs are captured in another
one, where nothing is planned and our own kernel computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fuseline.compile.ops.attention_batch import AttentionLayer

WORKSPACE = 128 << 20
"""Bytes of partial sums that the library recommends to have room for."""


@dataclass
class _Plan:
    wrapper: object
    num_tokens: int
    num_seqs: int


class PlannedPrefill:
    """`ours` computes what was not planned.

    Plans lie in pinned memory whose copy to the device may be under way when the next step is planned, so two
    wrappers take turns, and one is taken again only when its copies of two steps ago are done.
    """

    def __init__(self, wrapper: Callable, layer: AttentionLayer, table: str, device: str, ours: Callable) -> None:
        self._layer = layer
        self._table = table
        self._is_cuda = device == "cuda"
        self._ours = ours
        workspace = torch.empty(WORKSPACE if self._is_cuda else 1, dtype=torch.uint8, device=device)
        self._wrappers = [wrapper(workspace, "HND") for _ in range(2)]
        self._copied = [torch.get_device_module(device).Event() for _ in range(2)]
        self._turn = 0
        self._local = threading.local()

    def plan(self, host: Mapping[str, Tensor]) -> None:
        """`host`: query_start [S + 1], seq_lens [S] and the block table [S, M], int32, by placeholder name."""
        self._local.plan = None
        starts, lengths, table = (host[name].numpy() for name in ("query_start", "seq_lens", self._table))
        if starts[-1] <= len(lengths):  # one token a sequence: not for this kernel
            return
        self._turn = 1 - self._turn
        wrapper, copied = self._wrappers[self._turn], self._copied[self._turn]
        copied.synchronize()
        layer, blocks = self._layer, -(-lengths // self._layer.block_size)
        pages = table[np.arange(table.shape[1]) < blocks[:, None]]
        in_last = np.where(lengths > 0, lengths - (blocks - 1) * layer.block_size, 0)
        wrapper.plan(
            self._pinned(starts), self._pinned(np.concatenate(([0], np.cumsum(blocks)))), self._pinned(pages),
            self._pinned(in_last), layer.heads, layer.kv_heads, layer.key_dim, layer.block_size, causal=True,
            sm_scale=layer.scale, window_left=layer.window - 1 if layer.window > 0 else -1,
            logits_soft_cap=layer.softcap, q_data_type=layer.dtype, kv_data_type=layer.cache_dtype,
        )  # fmt: skip
        copied.record()
        self._local.plan = _Plan(wrapper, int(starts[-1]), len(lengths))

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *rest: object) -> Tensor:
        """The op; tokens behind the planned ones (padding) are left alone."""
        plan: _Plan | None = getattr(self._local, "plan", None)
        if plan is None or plan.num_seqs != block_table.shape[0] or plan.num_tokens > q.shape[2]:
            return self._ours(q, k_cache, v_cache, block_table, *rest)
        out = q.new_empty(1, q.shape[2], q.shape[1], v_cache.shape[3])
        rows = q[0].transpose(0, 1)[: plan.num_tokens]
        plan.wrapper.run(rows, (k_cache, v_cache), out=out[0, : plan.num_tokens])
        return out

    def _pinned(self, values: np.ndarray) -> Tensor:
        """A copy of its own: the arrays of a step are overwritten by the next."""
        tensor = torch.from_numpy(values.astype(np.int32))
        return tensor.pin_memory() if self._is_cuda else tensor
