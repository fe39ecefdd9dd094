"""Rotary embedding and the KV cache's write on CUDA.

Legend: H query heads, K kv heads, T tokens, D head dim, E value dim, R rotary dim, P table rows, C table columns.
A program takes one token and some heads, so a line of the tables is read once for them. Each product is rounded to the
dtype before the two are added, as the two multiplications of Transformers are; fusing them would be another number.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fuseline.compile.kernels.registry import Implementation, tunings
from fuseline.compile.kernels.triton.rope_kernels import rope_cache_kernel, rope_kernel, write_kernel

HEADS = 8  # heads of a program
HEADS_TO_TRY = (2, 4, 32)
"""Measured by -O3 beside that."""


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, rotary_dim: int, layout: int, *, heads: int = HEADS
) -> Tensor:
    """x[1, H, T, D] with the first R of D rotated by rows[T] of cos and sin [P, C], C = R or R / 2.

    `heads` of a program, also below, change no bit.
    """
    _check(x, cos)
    out = torch.empty_like(x)
    if out.numel():
        rope_kernel[_grid(x, heads)](
            out, x, cos, sin, rows, *_head_strides(out), *_head_strides(x), cos.stride(0), H=x.shape[1],
            **shape_of(x, cos, rotary_dim, layout, heads),
        )  # fmt: skip
    return out


def write_cache(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """k[1, K, T, D], v[1, K, T, E] to slot = block * block size + offset of caches [N, K, B, D|E]; -1 writes nothing.

    An fp8 cache (float8_e5m2, float8_e4m3fn, or that as uint8) holds the numbers divided by k_scale[1], v_scale[1], at
    most its largest.
    """
    for cache, new, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
        store(cache, new, slots, scale)


def rope_cache(
    k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rows: Tensor,
    slots: Tensor, rotary_dim: int, layout: int, k_scale: Tensor | None = None, v_scale: Tensor | None = None, *,
    heads: int = HEADS,
) -> Tensor:  # fmt: skip
    """Rotated q; rotated k and v go to the caches."""
    _check(q, cos)
    _check(k, cos)
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    k_cache, v_cache, v = bytes_of(k_cache), bytes_of(v_cache), v if v.stride(3) == 1 else v.contiguous()
    q_parts, kv_parts = (triton.cdiv(x.shape[1], heads) for x in (q, k))
    strides = [stride for x in (out, q, k, v) for stride in _head_strides(x)]
    rope_cache_kernel[(q.shape[2], q_parts + 2 * kv_parts)](
        out, k_cache, v_cache, q, k, v, cos, sin, rows, slots, *strides, cos.stride(0), *k_cache.stride()[:3],
        *v_cache.stride()[:3], k_scale, v_scale, Q_PARTS=q_parts, KV_PARTS=kv_parts, H=q.shape[1], K=k.shape[1],
        E=v.shape[3], PADDED_E=triton.next_power_of_2(v.shape[3]), B=k_cache.shape[2],
        **shape_of(q, cos, rotary_dim, layout, heads),
    )  # fmt: skip
    return out


def store(cache: Tensor, new: Tensor, slots: Tensor, scale: Tensor | None) -> None:
    if new.numel() == 0:
        return
    cache, new = bytes_of(cache), new if new.stride(3) == 1 else new.contiguous()
    write_kernel[_grid(new, HEADS)](
        cache, new, slots, *_head_strides(new), *cache.stride()[:3], scale, H=new.shape[1], D=new.shape[3],
        PADDED_D=triton.next_power_of_2(new.shape[3]), B=cache.shape[2], HEADS=HEADS, num_warps=4,
    )  # fmt: skip


def _check(x: Tensor, cos: Tensor) -> None:
    if x.stride(3) != 1 or cos.stride(1) != 1:
        raise ValueError("rope needs the last dimension of x and of the tables contiguous")


def _grid(x: Tensor, heads: int) -> tuple[int, int]:
    return x.shape[2], triton.cdiv(x.shape[1], heads)


def _head_strides(x: Tensor) -> tuple[int, int]:
    return x.stride(1), x.stride(2)


def shape_of(x: Tensor, cos: Tensor, rotary_dim: int, layout: int, heads: int) -> dict:
    rest = x.shape[3] - rotary_dim
    return {
        "D": x.shape[3], "R": rotary_dim, "C": cos.shape[1], "PADDED_PAIRS": triton.next_power_of_2(rotary_dim // 2),
        "PADDED_REST": triton.next_power_of_2(rest) if rest else 0, "LAYOUT": layout, "HEADS": heads, "num_warps": 4,
        # A multiplication and an addition made one would round once where two are asked for.
        "enable_fp_fusion": False,
    }  # fmt: skip


def bytes_of(cache: Tensor) -> Tensor:
    """An e4m3 cache as bytes: sm_80 has no such numbers, only e5m2."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def rotates(x: Tensor, cos: Tensor, sin: Tensor, *_: object) -> bool:
    """Tables are of x's dtype or wider; with wider ones the result is rounded once, to x's."""
    return cos.dtype == sin.dtype and cos.dtype in (x.dtype, torch.float32) and x.stride(3) == 1


def _rotates_into_cache(k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor, *tables: object) -> bool:
    return rotates(q, *tables) and rotates(k, *tables)


HEADS_TUNINGS = tunings("heads", HEADS_TO_TRY, "h")
IMPLEMENTATIONS = (
    Implementation("rope", "triton.rope", "cuda", rope, supports=rotates, tunings=HEADS_TUNINGS),
    Implementation("write_cache", "triton.write_cache", "cuda", write_cache),
    Implementation(
        "rope_cache", "triton.rope_cache", "cuda", rope_cache, supports=_rotates_into_cache, tunings=HEADS_TUNINGS
    ),
)  # fmt: skip
