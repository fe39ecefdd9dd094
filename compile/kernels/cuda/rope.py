"""Rotary embedding and the KV cache's write by csrc/cuda/rope.cu.

Legend: H query heads, K kv heads, T tokens, D head dim, E value dim, N blocks of B keys, P table rows, C table columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuseline.compile.kernels.cuda.library import DTYPES, CudaLibrary, native
from fuseline.compile.ops.rope import FP8


def rope(lib: CudaLibrary, x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, rotary_dim: int, layout: int) -> Tensor:
    """x[1, H, T, D] with the first R of D rotated by rows[T] of cos and sin [P, C], C = R or R / 2."""
    out = torch.empty_like(x)
    if out.numel():
        num_heads, num_tokens, dim = x.shape[1:]
        lib.call(
            "rope", out, out=out, x=x, cos=cos, sin=sin, rows=rows, num_heads=num_heads, num_tokens=num_tokens, dim=dim,
            x_head=x.stride(1), x_token=x.stride(2), out_head=out.stride(1), out_token=out.stride(2),
            table_stride=cos.stride(0), rotary_dim=rotary_dim, columns=cos.shape[1], layout=layout,
            dtype=DTYPES[x.dtype], table_dtype=DTYPES[cos.dtype],
        )  # fmt: skip
    return out


def write_cache(
    lib: CudaLibrary, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """k[1, K, T, D], v[1, K, T, E] to slots of caches [N, K, B, D|E]; fp8 ones hold them over k_scale, v_scale [1]."""
    _rope_cache(lib, None, None, k_cache, v_cache, k, v, (None, None, None), slots, (k_scale, v_scale), 0, 0)


def rope_cache(
    lib: CudaLibrary, k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    rows: Tensor, slots: Tensor, rotary_dim: int, layout: int, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rotated q; rotated k and v go to the caches."""
    out = torch.empty_like(q)
    scales = (k_scale, v_scale)
    _rope_cache(lib, out, q, k_cache, v_cache, k, v, (cos, sin, rows), slots, scales, rotary_dim, layout)
    return out


def _rope_cache(
    lib: CudaLibrary, out: Tensor | None, q: Tensor | None, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor,
    tables: tuple, slots: Tensor, scales: tuple, rotary_dim: int, layout: int,
) -> None:  # fmt: skip
    if k.numel() == 0:
        return
    v = v if v.stride(3) == 1 else v.contiguous()
    k = k if k.stride(3) == 1 else k.contiguous()
    cos, sin, rows = tables
    _, num_kv_heads, num_tokens, dim = k.shape
    (_, k_head, k_token, _), (_, v_head, v_token, _) = k.stride(), v.stride()
    k_cache_block, k_cache_head, k_cache_token, _ = k_cache.stride()
    v_cache_block, v_cache_head, v_cache_token, _ = v_cache.stride()
    num_heads = q_head = q_token = out_head = out_token = table_stride = columns = 0
    table_dtype = k.dtype
    if q is not None:
        num_heads, (_, q_head, q_token, _), (_, out_head, out_token, _) = q.shape[1], q.stride(), out.stride()
        table_stride, columns, table_dtype = cos.stride(0), cos.shape[1], cos.dtype
    lib.call(
        "rope_cache", k, q_out=out, k_cache=k_cache, v_cache=v_cache, q=q, k=k, v=v, cos=cos, sin=sin, rows=rows,
        slots=slots, k_scale=scales[0], v_scale=scales[1], num_heads=num_heads, num_kv_heads=num_kv_heads,
        num_tokens=num_tokens, dim=dim, value_dim=v.shape[3], q_head=q_head, q_token=q_token, k_head=k_head,
        k_token=k_token, v_head=v_head, v_token=v_token, out_head=out_head, out_token=out_token,
        k_cache_block=k_cache_block, k_cache_head=k_cache_head, k_cache_token=k_cache_token,
        v_cache_block=v_cache_block, v_cache_head=v_cache_head, v_cache_token=v_cache_token,
        block_size=k_cache.shape[2], table_stride=table_stride, rotary_dim=rotary_dim, columns=columns, layout=layout,
        dtype=DTYPES[k.dtype], table_dtype=DTYPES[table_dtype], cache_dtype=DTYPES[k_cache.dtype],
    )  # fmt: skip


def _rotates(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, *_: object) -> bool:
    """Tables are of x's dtype or wider."""
    dtypes = cos.dtype == sin.dtype and cos.dtype in (x.dtype, torch.float32) and rows.dtype == torch.int64
    return x.dtype in DTYPES and dtypes and x.stride(3) == 1 and cos.stride(1) == 1


def _keeps(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, *_: object) -> bool:
    stored = (k.dtype, *FP8)
    is_laid_out = k_cache.stride(3) == 1 and v_cache.stride(3) == 1
    same = k_cache.dtype == v_cache.dtype and v.dtype == k.dtype and k_cache.dtype in stored
    return k.dtype in DTYPES and same and is_laid_out and slots.dtype == torch.int64


def _rotates_into_cache(
    k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rows: Tensor,
    slots: Tensor, *_: object,
) -> bool:  # fmt: skip
    rotates = _rotates(q, cos, sin, rows) and _rotates(k, cos, sin, rows) and q.dtype == k.dtype
    return rotates and _keeps(k_cache, v_cache, k, v, slots)


IMPLEMENTATIONS = (
    native("rope", rope, _rotates),
    native("write_cache", write_cache, _keeps),
    native("rope_cache", rope_cache, _rotates_into_cache, is_step=True),
)
