"""An attention layer's sizes and options, and random batches of such a layer to try and measure kernels with.

Legend: H query heads, K kv heads, T tokens, S sequences, M columns of the block table, N blocks of B keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionLayer:
    """Everything about a paged_attention call but its batch."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    has_sinks: bool
    has_scales: bool
    """Stored keys and values are to be multiplied (fp8)."""
    window: int
    scale: float
    softcap: float
    has_slopes: bool = False
    chunk: int = 0

    @staticmethod
    def of(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor,
        sinks: Tensor | None, window: int, scale: float, softcap: float, k_scale: Tensor | None = None,
        v_scale: Tensor | None = None, slopes: Tensor | None = None, chunk: int = 0,
    ) -> AttentionLayer:  # fmt: skip
        """From the op's arguments, tensors perhaps on meta."""
        _, kv_heads, block_size, key_dim = k_cache.shape
        return AttentionLayer(
            int(q.shape[1]), kv_heads, key_dim, v_cache.shape[3], block_size, q.dtype, k_cache.dtype, sinks is not None,
            k_scale is not None or v_scale is not None, window, scale, softcap, slopes is not None, chunk,
        )  # fmt: skip


@dataclass(frozen=True)
class AttentionBatch:
    """`args` of the op on the device, and on the host what batches are planned by, by placeholder name."""

    args: tuple
    host: Mapping[str, Tensor]


def make_batch(
    layer: AttentionLayer, lengths: Sequence[int], counts: Sequence[int], device: str,
    table_name: str = "block_table_0", max_bytes: int = 1 << 28,
) -> AttentionBatch:  # fmt: skip
    """Sequences of `lengths` keys of which the last `counts` are this step's tokens, over random numbers.

    Their blocks lie anywhere among those of `max_bytes` of cache; sequences share blocks only where that is too little.
    """
    generator = torch.Generator().manual_seed(0)
    width = max(1, max(-(-length // layer.block_size) for length in lengths))
    block_bytes = layer.kv_heads * layer.block_size * (layer.key_dim + layer.value_dim) * layer.cache_dtype.itemsize
    num_blocks = max(width, min(len(lengths) * width, max_bytes // block_bytes))
    ids = torch.randperm(num_blocks, generator=generator).repeat(-(-len(lengths) * width // num_blocks))
    host = {
        table_name: ids[: len(lengths) * width].reshape(len(lengths), width).int(),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "query_start": torch.tensor([0, *counts]).cumsum(0).int(),
    }

    def randn(*shape: int, dtype: torch.dtype = layer.dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    caches = [
        randn(num_blocks, layer.kv_heads, layer.block_size, dim, dtype=layer.cache_dtype)
        for dim in (layer.key_dim, layer.value_dim)
    ]
    # As a joined product hands them on: the heads of a token side by side.
    q = randn(1, sum(counts), layer.heads, layer.key_dim).transpose(1, 2)
    sinks = randn(layer.heads) if layer.has_sinks else None
    scales = [torch.ones(1, device=device) if layer.has_scales else None for _ in "kv"]
    slopes = 2.0 ** -torch.arange(1, layer.heads + 1, device=device) if layer.has_slopes else None
    table, seq_lens, query_start = (host[name].to(device) for name in (table_name, "seq_lens", "query_start"))
    numbers = layer.window, layer.scale, layer.softcap
    args = (q, *caches, table, seq_lens, query_start, sinks, *numbers, *scales, slopes, layer.chunk)
    return AttentionBatch(args, host)
