"""Attention libraries that are none: the signatures of the real ones, their checks, and their masks in plain torch.

Signatures and conventions are those of flash-attn 2.8.4, of its FlashAttention 3 (`hopper`), of torch 2.13 and of
FlashInfer 0.6.18. What a real one leaves unwritten is NaN here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, softcap: float) -> Tensor:
    """q[n, H, D] over k[l, K, D], v[l, K, E]: query i sees keys i + l - n - left to i + l - n + right, -1 for all."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q.float(), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    offset = torch.arange(k.shape[0]) - (torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0])
    seen = (offset >= -left if left >= 0 else offset == offset) & (offset <= right if right >= 0 else offset == offset)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hnl,lhe->nhe", weights, v).to(q.dtype)


def check(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def check_paged(q: Tensor, k: Tensor, v: Tensor, table: Tensor, starts: Tensor) -> None:
    check(q.dtype in HALVES and k.dtype == q.dtype == v.dtype, "only fp16 and bf16, all of one")
    check(q.dim() == 3 and k.dim() == v.dim() == 4, "q of tokens, caches of pages")
    check(q.stride(-1) == k.stride(-1) == v.stride(-1) == table.stride(-1) == 1, "contiguous last dimension")
    check(table.dtype == starts.dtype == torch.int32 and starts.is_contiguous(), "int32")
    check(q.shape[1] % k.shape[2] == 0 and q.shape[2] == k.shape[3], "heads and sizes that go together")
    check(k.shape[:3] == v.shape[:3] and table.shape[0] == starts.shape[0] - 1, "one page table for both")


def paged(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """[length, K, D] of a cache [N, B, K, D]."""
    return cache[pages[: -(-length // cache.shape[1])].long()].flatten(0, 1)[:length]


def spans(starts: Tensor) -> Iterator[tuple[int, int, int]]:
    bounds = starts.tolist()
    for s in range(len(bounds) - 1):
        yield s, bounds[s], bounds[s + 1]


def over_pages(q, k, v, table, starts, lengths, scale, left, right, softcap) -> Tensor:
    out = torch.full((q.shape[0], q.shape[1], v.shape[3]), float("nan"), dtype=q.dtype)
    for s, begin, end in spans(starts):
        length = int(lengths[s])
        keys, values = paged(k, table[s], length), paged(v, table[s], length)
        out[begin:end] = attend(q[begin:end], keys, values, scale, left, right, softcap)
    return out


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    """FlashAttention 3."""
    check_paged(q, k_cache, v_cache, page_table, cu_seqlens_q)
    key, value = q.shape[2], v_cache.shape[3]
    check(key <= 256 and key % 8 == 0 and value % 8 == 0, "head sizes")
    check(key == value or 128 < key <= 192 and 96 < value <= 128 or key <= 64 and value <= 512, "unequal head sizes")
    check(cache_seqlens.dtype == torch.int32 and cache_seqlens.is_contiguous(), "int32 lengths")
    check(max_seqlen_q >= int(cu_seqlens_q.diff().max()), "rows beyond the longest are not computed")
    left, right = window_size
    right = 0 if causal else right
    return over_pages(q, k_cache, v_cache, page_table, cu_seqlens_q, cache_seqlens, softmax_scale, left, right, softcap)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """FlashAttention 2."""
    check_paged(q, k, v, block_table, cu_seqlens_q)
    check_flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left, right = window_size
    right = 0 if causal else right
    lengths = cu_seqlens_k.diff()
    return over_pages(q, k, v, block_table, cu_seqlens_q, lengths, softmax_scale, left, right, softcap)


def check_flash_2(q, k, v, starts_q, starts_k, max_q, max_k) -> None:
    check(k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    check(q.shape[2] == v.shape[3] <= 256 and q.shape[2] % 8 == 0, "head sizes")
    check(starts_k.dtype == torch.int32 and starts_k.shape == starts_q.shape, "int32 starts of keys")
    check(max_q >= int(starts_q.diff().max()) and max_k >= int(starts_k.diff().max()), "longer than the longest")


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """torch.nn.attention.varlen, over torch's build of FlashAttention 2."""
    check_paged(query, key, value, block_table, cu_seq_q)
    check_flash_2(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    check(enable_gqa or query.shape[1] == key.shape[2], "as many heads, or enable_gqa")
    check(torch.equal(cu_seq_k.diff(), seqused_k) and seqused_k.dtype == torch.int32, "keys that are used")
    return over_pages(query, key, value, block_table, cu_seq_q, seqused_k, scale, *window_size, 0.0)


class BatchPrefillWithPagedKVCacheWrapper:
    """FlashInfer's."""

    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None,
        mask_indptr_buf=None, backend="auto", jit_args=None, jit_kwargs=None,
    ):  # fmt: skip
        check(kv_layout in ("NHD", "HND"), "kv_layout")
        self._is_heads_first = kv_layout == "HND"
        self.num_plans = 0

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None, o_data_type=None,
        non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0,
        max_item_len_ptr=None, seq_lens=None, seq_lens_q=None, block_tables=None, max_token_per_sequence=None,
        max_sequence_kv=None, fixed_split_size=None, disable_split_kv=False,
    ):  # fmt: skip
        arrays = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        check(all(array.dtype == torch.int32 and array.dim() == 1 for array in arrays), "int32")
        check(len(paged_kv_indices) == int(paged_kv_indptr[-1]), "as many pages as are counted")
        check(bool((paged_kv_last_page_len <= page_size).all()), "keys of the last page")
        self._arrays = [array.clone() for array in arrays]
        self._shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._dtypes = (q_data_type, kv_data_type or q_data_type)
        self._how = (sm_scale, window_left, 0 if causal else -1, logits_soft_cap or 0.0)
        self.num_plans += 1

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False,
        enable_pdl=None, window_left=None, sinks=None, kv_cache_sf=None, skip_softmax_threshold_scale_factor=None,
        use_fp16_softmax=None, uses_spcompress=None,
    ):  # fmt: skip
        caches = [cache.transpose(1, 2) if self._is_heads_first else cache for cache in paged_kv_cache]
        starts, page_starts, pages, in_last = self._arrays
        check((q.dtype, caches[0].dtype) == self._dtypes, "other dtypes than planned")
        check(
            (q.shape[1], caches[0].shape[2], q.shape[2], caches[0].shape[1]) == self._shape, "other sizes than planned"
        )
        check(q.shape[0] == int(starts[-1]) and out.shape == q.shape, "as many rows as planned")
        for s, begin, end in spans(starts):
            own = pages[page_starts[s] : page_starts[s + 1]]
            length = max(len(own) - 1, 0) * self._shape[3] + int(in_last[s])
            keys, values = (paged(cache, own, length) for cache in caches)
            out[begin:end] = attend(q[begin:end], keys, values, *self._how)
        return out
