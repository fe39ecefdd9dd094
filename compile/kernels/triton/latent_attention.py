"""Attention over a paged cache of latents on CUDA: attention.py, with values that are the first numbers of their keys.

Legend: H query heads, K kv heads, T query tokens, N blocks of B keys, D key dim, E value dim, R rank, P rotated dim.
"""

from __future__ import annotations

from functools import partial

import triton
from torch import Tensor

from fuseline.compile.kernels.registry import Implementation, tunings
from fuseline.compile.kernels.triton import attention
from fuseline.compile.kernels.triton import rope as rotary
from fuseline.compile.kernels.triton.rope_kernels import rope_latent_kernel
from fuseline.compile.ops.library import DECODE, PREFILL


def latent_attention(
    q: Tensor, latent_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor, sinks: Tensor | None,
    value_dim: int, window: int, scale: float, softcap: float, latent_scale: Tensor | None = None, **options: object,
) -> Tensor:  # fmt: skip
    """q[1, H, T, D] over a cache [N, K, B, D] -> [1, T, H, E]; options as of attention.paged_attention."""
    batch, scales = (block_table, seq_lens, query_start, sinks), (latent_scale, latent_scale)
    values = latent_cache[..., :value_dim]
    return attention.attention(q, latent_cache, values, *batch, window, scale, softcap, *scales, **options)


def write_latent(latent_cache: Tensor, k: Tensor, slots: Tensor, latent_scale: Tensor | None = None) -> None:
    """k[1, K, T, D] to slots of a cache [N, K, B, D], as write_cache does."""
    rotary.store(latent_cache, k, slots, latent_scale)


def rope_latent(
    latent_cache: Tensor, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor,
    rows: Tensor, slots: Tensor, rotary_dim: int, layout: int, latent_scale: Tensor | None = None, *,
    heads: int = rotary.HEADS,
) -> Tensor:  # fmt: skip
    """q_nope[1, H, T, R] with rotated q_pe[1, H, T, P] behind it; latent and rotated k_pe go to the cache so.

    `heads` of a program change no bit.
    """
    parts = [x if x.stride(3) == 1 else x.contiguous() for x in (q_nope, q_pe, latent, k_pe)]
    q_nope, q_pe, latent, k_pe = parts
    _, num_heads, tokens, rank = q_nope.shape
    out = q_nope.new_empty(1, num_heads, tokens, rank + q_pe.shape[3])
    if out.numel() == 0:
        return out
    cache, q_parts = rotary.bytes_of(latent_cache), triton.cdiv(num_heads, heads)
    strides = [stride for x in (out, *parts) for stride in (x.stride(1), x.stride(2))]
    rope_latent_kernel[(tokens, q_parts + triton.cdiv(cache.shape[1], heads))](
        out, cache, *parts, cos, sin, rows, slots, *strides, cos.stride(0), *cache.stride()[:3], latent_scale,
        Q_PARTS=q_parts, H=num_heads, K=cache.shape[1], RANK=rank, PADDED_RANK=triton.next_power_of_2(rank),
        B=cache.shape[2], **rotary.shape_of(q_pe, cos, rotary_dim, layout, heads),
    )  # fmt: skip
    return out


def _rotates(latent_cache: Tensor, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, *tables: object) -> bool:
    return rotary.rotates(q_pe, *tables)


IMPLEMENTATIONS = (
    Implementation(
        "rope_latent", "triton.rope_latent", "cuda", rope_latent, supports=_rotates, tunings=rotary.HEADS_TUNINGS
    ),
    Implementation("write_latent", "triton.write_latent", "cuda", write_latent),
    Implementation(
        "paged_latent_attention", "triton.paged_latent_attention", "cuda", latent_attention, phases=(DECODE, PREFILL),
        tunings=(
            *tunings("tuning", attention.DECODE_TUNINGS, phases=(DECODE,)),
            *tunings("tuning", attention.PREFILL_TUNINGS, phases=(PREFILL,)),
        ),
    ),
    Implementation(
        "paged_latent_attention_invariant", "triton.paged_latent_attention_invariant", "cuda",
        partial(latent_attention, prefill_from=1),
    ),
)  # fmt: skip
