"""Which Triton kernel computes a graph op. One line a kernel; the tests of tests/test_triton_ops.py come from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fuseline.compile.kernels.triton import activation, attention, experts, linear, matmul, norm, rope, route, rows

OPS = torch.ops.fuseline


@dataclass(frozen=True)
class TritonKernel:
    """`run` takes the op's arguments and gives its outputs; what the op mutates is written in place.

    `supports` sees the arguments too, tensors perhaps on meta; `into` writes to a result that comes first.
    """

    run: Callable
    supports: Callable[..., bool] = lambda *args: True
    into: Callable | None = None


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor,
    sinks: Tensor | None, window: int, scale: float, softcap: float, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None, *, tuning: attention.Tuning | None = None,
) -> Tensor:  # fmt: skip
    """q[1, H, T, D] over caches [N, K, B, D|E] -> [1, T, H, E]."""
    out = q.new_empty(1, q.shape[2], q.shape[1], v_cache.shape[3])
    _attend(
        out, q, k_cache, v_cache, block_table, seq_lens, query_start, sinks, window, scale, softcap, k_scale, v_scale,
        tuning=tuning,
    )  # fmt: skip
    return out


def _attend(out: Tensor, q: Tensor, *rest: object, tuning: attention.Tuning | None = None) -> None:
    attention.paged_attention(out, q if q.stride(3) == 1 else q.contiguous(), *rest, tuning=tuning)


def paged_attention_invariant(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor,
    sinks: Tensor | None, window: int, scale: float, softcap: float, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As paged_attention; of fp8 caches, scales times what is stored."""
    out = q.new_empty(1, q.shape[2], q.shape[1], v_cache.shape[3])
    attention.paged_attention(
        out, q if q.stride(3) == 1 else q.contiguous(), k_cache, v_cache, block_table, seq_lens, query_start, sinks,
        window, scale, softcap, k_scale=k_scale, v_scale=v_scale, prefill_from=1,
    )  # fmt: skip
    return out


def _norms(x: Tensor, *_: object) -> bool:
    return norm.supports(x)


def _rotates(x: Tensor, cos: Tensor, sin: Tensor, *_: object) -> bool:
    """Tables are of x's dtype or wider; with wider ones the result is rounded once, to x's."""
    return cos.dtype == sin.dtype and cos.dtype in (x.dtype, torch.float32) and x.stride(3) == 1


def _rotates_into_cache(k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor, *tables: object) -> bool:
    return _rotates(q, *tables) and _rotates(k, *tables)


KERNELS: dict[object, TritonKernel] = {
    OPS.rms_norm.default: TritonKernel(norm.rms_norm, _norms),
    OPS.add_rms_norm.default: TritonKernel(norm.add_rms_norm, _norms),
    OPS.layer_norm.default: TritonKernel(norm.layer_norm, _norms),
    OPS.add_layer_norm.default: TritonKernel(norm.add_layer_norm, _norms),
    OPS.act_mul.default: TritonKernel(activation.act_mul),
    OPS.gather_rows.default: TritonKernel(rows.gather_rows),
    OPS.rope.default: TritonKernel(rope.rope, _rotates),
    OPS.write_cache.default: TritonKernel(rope.write_cache),
    OPS.rope_cache.default: TritonKernel(rope.rope_cache, _rotates_into_cache),
    OPS.paged_attention.default: TritonKernel(paged_attention, into=_attend),
    OPS.paged_attention_invariant.default: TritonKernel(paged_attention_invariant),
    OPS.route_topk.default: TritonKernel(route.route_topk),
    OPS.experts.default: TritonKernel(experts.experts),
    OPS.experts_invariant.default: TritonKernel(experts.experts_invariant),
    OPS.linear_act_mul.default: TritonKernel(linear.linear_act_mul),
    OPS.linear_invariant.default: TritonKernel(matmul.matmul),
}
