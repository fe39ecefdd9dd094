"""Paged attention with biases by distance that a query itself computes (Inkling).

Legend: H query heads, K kv heads, T query tokens, D key dim, E value dim, S sequences, M table columns, R distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from fuseline.compile.ops.attention import over_pages, paged_attention_inputs, paged_attention_workloads, value_dim
from fuseline.compile.ops.library import Make, ModelShape, Workload, op

DISTANCES = 128


def paged_relative_attention_inputs(make: Make) -> Iterator[tuple]:
    """As paged_attention's, with biases for fewer distances than there are keys."""
    for q, *batch, sinks, window, scale, softcap in (args[:10] for args in paged_attention_inputs(make)):
        yield q, *batch, sinks, window, scale, softcap, make.normal(1, q.shape[1], q.shape[2], 9).float()


def paged_relative_attention_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    for work in paged_attention_workloads(make, shape):
        _, num_heads, num_tokens, _ = work.args[0].shape
        yield replace(work, args=(*work.args, make.fill(1, num_heads, num_tokens, DISTANCES).float()))


@op(
    fake=lambda q, k_cache, v_cache, *_: q.new_empty(q.shape[0], q.shape[2], q.shape[1], value_dim(v_cache)),
    inputs=paged_relative_attention_inputs,
    workloads=paged_relative_attention_workloads,
    tolerance=12.0,
)
def paged_relative_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor,
    sinks: Tensor | None, window: int, scale: float, softcap: float, relative: Tensor, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """paged_attention of q[1, H, T, D] with relative[1, H, T, R] (float32), as `attend` defines it -> [1, T, H, E]."""
    batch = block_table, seq_lens, query_start
    scales = k_scale, v_scale
    return over_pages(q, k_cache, v_cache, *batch, sinks, window, scale, softcap, *scales, relative=relative)
