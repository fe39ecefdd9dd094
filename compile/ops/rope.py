"""Rotary embedding and the KV cache write. Legend: H heads, T tokens, D head dim, P table rows, C table columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fuseline.compile.ops import codes
from fuseline.compile.ops.library import ROWS, CallShape, Make, ModelShape, StepSize, Workload, op, same_layout
from fuseline.compile.specs import FP8_DTYPES, SCALE_BYTES

FP8 = tuple(getattr(torch, name) for name in dict.fromkeys(FP8_DTYPES.values()))
"""Dtypes of caches whose numbers are scaled."""


def rope_size(x: Tensor, *_: object) -> tuple[str, int]:
    """(phase, rows) of rope; x[1, H, T, D]."""
    return ROWS, x.shape[2]


def write_size(k_cache: Tensor, v_cache: Tensor, x: Tensor, *_: object) -> tuple[str, int]:
    """(phase, rows) of rope_cache and write_cache; x[1, H, T, D]."""
    return rope_size(x)


def make_heads(inputs: Mapping[str, Tensor], fixed: Mapping[str, object], step: StepSize) -> dict[str, Tensor]:
    """The heads of a token side by side, as a joined product leaves them; slots one after the other."""
    return {name: _make_heads(name, x, fixed, step) for name, x in inputs.items()}


def _make_heads(name: str, x: Tensor, fixed: Mapping[str, object], step: StepSize) -> Tensor:
    if name == "slots":
        return torch.arange(step.rows, device=step.device)
    if name == "rows":
        return torch.arange(step.rows, device=step.device) % fixed["cos"].shape[0]
    if name.endswith("_cache"):
        shape = (-(-step.rows // x.shape[2]), *x.shape[1:])
        return torch.zeros(shape, dtype=x.dtype, device=step.device)
    return step.randn(x, 1, step.rows, x.shape[1], x.shape[3]).transpose(1, 2)


def tables(make: Make, rotary_dim: int, columns: int) -> tuple:
    angles = make.normal(40, columns).float()
    if columns == rotary_dim:
        angles[:, columns // 2 :] = angles[:, : columns // 2]
    return angles.cos().to(make.dtype), angles.sin().to(make.dtype)


def rope_inputs(make: Make) -> Iterator[tuple]:
    half, pairs, split = codes.ROPE_HALF, codes.ROPE_INTERLEAVED, codes.ROPE_SPLIT
    for dim, rotary_dim, columns, layout in (
        (16, 16, 16, half), (16, 8, 4, half), (24, 24, 12, pairs), (16, 8, 4, pairs), (80, 70, 70, pairs),
        (24, 24, 12, split), (16, 8, 8, split), (80, 70, 35, split),
    ):  # fmt: skip
        yield make.normal(1, 3, 5, dim), *tables(make, rotary_dim, columns), make.ids(40, 5), rotary_dim, layout


def write_cache_inputs(make: Make) -> Iterator[tuple]:
    slots = make.order(6 * 16)[:5]
    slots[2] = -1
    caches = make.normal(6, 2, 16, 24), make.normal(6, 2, 16, 16)
    yield *caches, make.normal(1, 2, 5, 24), make.normal(1, 2, 5, 16), slots


def rope_cache_inputs(make: Make) -> Iterator[tuple]:
    """Full and partial rotation, tables as wide as the rotary dim and half of it, and a token without a slot."""
    half, pairs, split = codes.ROPE_HALF, codes.ROPE_INTERLEAVED, codes.ROPE_SPLIT
    for layout, columns, dim in (
        (half, 16, 16), (half, 8, 16), (pairs, 8, 16), (half, 8, 8), (pairs, 4, 8), (split, 8, 16), (split, 4, 8),
    ):  # fmt: skip
        caches = make.normal(6, 2, 16, 16), make.normal(6, 2, 16, 16)
        joined = make.normal(1, 5, 4 * 16 + 2 * 16)
        q, k = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in joined.split((64, 32), -1))
        slots = make.order(6 * 16)[:5]
        slots[1] = -1
        rows = make.ids(40, 5)
        yield *caches, q, k, make.normal(1, 2, 5, 16), *tables(make, dim, columns), rows, slots, dim, layout


def heads(make: Make, shape: ModelShape, tokens: int, *counts: int) -> tuple[Tensor, ...]:
    """Heads with the strides of a joined linear's output: [1, H, T, D], T outermost in memory."""
    joined = make.fill(1, tokens, sum(counts), shape.head_dim).transpose(1, 2)
    return joined.split(counts, 1)


def caches(make: Make, shape: ModelShape) -> tuple[Tensor, Tensor]:
    """Caches of 1,024 tokens, or of as many as a step has."""
    num_blocks = max(64, -(-max(make.tokens) // 16))
    return tuple(make.fill(num_blocks, shape.num_kv_heads, 16, shape.head_dim) for _ in "kv")


def slots_for(make: Make, cache: Tensor, tokens: int) -> Tensor:
    """Random slots of the cache [N, K, B, D]."""
    return make.order(cache.shape[0] * cache.shape[2])[:tokens]


def turning(make: Make, shape: ModelShape, tokens: int) -> tuple[Tensor, ...]:
    """Returns cos, sin, rows."""
    tables = (make.fill(2048, shape.head_dim) for _ in range(2))
    return (*tables, make.ids(2048, tokens))


def rope_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    for tokens in make.tokens:
        (q,) = heads(make, shape, tokens, shape.num_heads)
        rest = (*turning(make, shape, tokens), shape.head_dim, codes.ROPE_HALF)
        moved = (2 * q.numel() + 2 * tokens * shape.head_dim) * make.dtype.itemsize
        yield Workload(f"{tokens} x {shape.num_heads} heads", (q, *rest), num_bytes=moved)


def write_cache_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    for tokens in make.tokens:
        k, v = heads(make, shape, tokens, shape.num_kv_heads, shape.num_kv_heads)
        kept = caches(make, shape)
        args = (*kept, k, v, slots_for(make, kept[0], tokens))
        yield Workload(f"{tokens} x {shape.num_kv_heads} heads", args, num_bytes=4 * k.numel() * make.dtype.itemsize)


def rope_cache_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    for tokens in make.tokens:
        q, k, v = heads(make, shape, tokens, shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        kept = caches(make, shape)
        slots = slots_for(make, kept[0], tokens)
        args = (*kept, q, k, v, *turning(make, shape, tokens), slots, shape.head_dim, codes.ROPE_HALF)
        moved = (2 * q.numel() + 4 * k.numel() + 2 * tokens * shape.head_dim) * make.dtype.itemsize
        yield Workload(f"{tokens} x {shape.num_heads} + {shape.num_kv_heads} heads", args, num_bytes=moved)


@op(
    inputs=rope_inputs,
    tolerance=0.0,
    workloads=rope_workloads,
    weights=("cos", "sin"),
    sums=False,
    calls=CallShape(rope_size, make_heads),
)
def rope(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, rotary_dim: int, layout: int) -> Tensor:
    """Rotates the first `rotary_dim` of x[1, H, T, D] by `rows`[T] of cos/sin[P, C], C the rotary dim or its half.

    `layout` says which features are pairs: ROPE_HALF (j, j + R/2), ROPE_INTERLEAVED (2j, 2j + 1), ROPE_SPLIT the
    latter, whose result lies as that of ROPE_HALF.
    """
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    c, s = (_line(table, rows, rotary_dim, layout) for table in (cos, sin))
    if layout == codes.ROPE_INTERLEAVED:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        if layout == codes.ROPE_SPLIT:
            turned = torch.cat((turned[..., ::2], turned[..., 1::2]), -1)
        low, high = turned.chunk(2, -1)
        partner = torch.cat((-high, low), -1)
    return torch.cat((turned * c + partner * s, rest), -1)


def _line(table: Tensor, rows: Tensor, rotary_dim: int, layout: int) -> Tensor:
    line = table[rows]
    if line.shape[-1] == rotary_dim:
        return line
    return line.repeat_interleave(2, -1) if layout == codes.ROPE_INTERLEAVED else torch.cat((line, line), -1)


@op(
    writes=("k_cache", "v_cache"),
    fake=lambda *_: None,
    inputs=write_cache_inputs,
    tolerance=0.0,
    workloads=write_cache_workloads,
    sums=False,
    calls=CallShape(write_size, make_heads),
    written=lambda k_cache, v_cache, k, v, *_: (k, v),
)
def write_cache(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes k, v [1, K, T, D] to slot = block * block_size + offset of caches [N, K, B, D]; slot -1 writes nothing.

    An fp8 cache stores values divided by k_scale[1] and v_scale[1] (float32; None: 1), saturated at its largest number.
    An int8 cache stores each token and head divided by a scale of its own, which lies behind it in 4 elements.
    """
    store_rows(k_cache, k, slots, k_scale)
    store_rows(v_cache, v, slots, v_scale)


def store_rows(cache: Tensor, new: Tensor, slots: Tensor, scale: Tensor | None) -> None:
    """One cache of write_cache."""
    kept = slots >= 0
    block, offset = slots[kept] // cache.shape[2], slots[kept] % cache.shape[2]
    cache[block, :, offset] = _coded(new[0].transpose(0, 1)[kept], cache.dtype, scale)


def _coded(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    if dtype == torch.int8:
        return to_int8(x.float())
    if dtype in FP8:
        largest = torch.finfo(dtype).max
        x = (x.float() if scale is None else x.float() / scale).clamp(-largest, largest)
    return x.to(dtype)


def to_int8(x: Tensor) -> Tensor:
    """float32 [..., D] -> int8 [..., D + 4], the scale of each row behind it: its largest magnitude is 127."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    codes = (x / torch.where(scale == 0, 1, scale)).round().to(torch.int8)
    return torch.cat((codes, scale.view(torch.int8)), -1)


def from_int8(stored: Tensor) -> Tensor:
    """The inverse of to_int8."""
    codes, scale = stored[..., :-SCALE_BYTES], stored[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return codes.float() * scale


@op(
    writes=("k_cache", "v_cache"),
    fake=lambda k_cache, v_cache, q, *_: same_layout(q),
    inputs=rope_cache_inputs,
    tolerance=0.0,
    workloads=rope_cache_workloads,
    weights=("cos", "sin"),
    sums=False,
    calls=CallShape(write_size, make_heads),
    written=lambda k_cache, v_cache, q, k, v, cos, sin, rows, slots, rotary_dim, layout, *_: (
        rope(k, cos, sin, rows, rotary_dim, layout),
        v,
    ),
)
def rope_cache(
    k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    rows: Tensor, slots: Tensor, rotary_dim: int, layout: int, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns the rotated q, and writes rotated k and v to the cache like write_cache."""
    write_cache(k_cache, v_cache, rope(k, cos, sin, rows, rotary_dim, layout), v, slots, k_scale, v_scale)
    return rope(q, cos, sin, rows, rotary_dim, layout)
