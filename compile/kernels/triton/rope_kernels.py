"""The kernels of rope.py, which has the legend."""

from __future__ import annotations

import triton
import triton.language as tl

from fuseline.compile.kernels.triton.lines import rounded
from fuseline.compile.ops import codes

INTERLEAVED = tl.constexpr(codes.ROPE_INTERLEAVED)


@triton.jit
def rope_kernel(
    out, x, cos, sin, rows, slots, out_stride_h, out_stride_t, x_stride_h, x_stride_t, table_stride, cache_stride_n,
    cache_stride_h, cache_stride_b, scale, H: tl.constexpr, B: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, PADDED_PAIRS: tl.constexpr, PADDED_REST: tl.constexpr, LAYOUT: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, HEADS heads): to out[1, H, T, D], or with `slots` to out, a cache [N, H, B, D]."""
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    to = out + t * out_stride_t + head * out_stride_h
    if slots is not None:
        slot = tl.load(slots + t).to(tl.int64)
        if slot < 0:
            return
        to = out + slot // B * cache_stride_n + slot % B * cache_stride_b + head.to(tl.int64) * cache_stride_h
    source = x + t * x_stride_t + head.to(tl.int64) * x_stride_h
    pair = tl.arange(0, PADDED_PAIRS)[None, :]
    there = (head < H) & (pair < R // 2)
    low = 2 * pair if LAYOUT == INTERLEAVED else pair
    high = 2 * pair + 1 if LAYOUT == INTERLEAVED else pair + R // 2
    line = tl.load(rows + t).to(tl.int64) * table_stride
    low_cos, high_cos = _line(cos + line, pair, low, high, R, C)
    low_sin, high_sin = _line(sin + line, pair, low, high, R, C)
    a = tl.load(source + low, mask=there, other=0.0)
    b = tl.load(source + high, mask=there, other=0.0)
    _store(to + low, _turned(a, low_cos, b, low_sin, -1.0), there, scale)
    _store(to + high, _turned(b, high_cos, a, high_sin, 1.0), there, scale)
    if PADDED_REST > 0:
        rest = R + tl.arange(0, PADDED_REST)[None, :]
        is_rest = (head < H) & (rest < D)
        _store(to + rest, tl.load(source + rest, mask=is_rest, other=0.0), is_rest, scale)


@triton.jit
def write_kernel(
    cache, x, slots, x_stride_h, x_stride_t, cache_stride_n, cache_stride_h, cache_stride_b, scale, H: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, B: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, HEADS heads)."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t).to(tl.int64)
    if slot < 0:
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, PADDED_D)[None, :]
    there = (head < H) & (dim < D)
    new = tl.load(x + t * x_stride_t + head.to(tl.int64) * x_stride_h + dim, mask=there, other=0.0)
    to = cache + slot // B * cache_stride_n + slot % B * cache_stride_b + head.to(tl.int64) * cache_stride_h
    _store(to + dim, new, there, scale)


@triton.jit
def _line(table, pair, low, high, R: tl.constexpr, C: tl.constexpr):
    """The table's entries for both of each pair; a table of half the columns has one for both."""
    if C == R:
        return tl.load(table + low, mask=pair < R // 2), tl.load(table + high, mask=pair < R // 2)
    else:
        entry = tl.load(table + pair, mask=pair < R // 2)
        return entry, entry


@triton.jit
def _turned(x, c, y, s, sign: tl.constexpr):
    """x * c + sign * y * s, the products rounded to the tables' dtype (x's, or float32), the sum to x's."""
    straight = rounded(x.to(tl.float32) * c.to(tl.float32), c.dtype)
    return (straight + sign * rounded(y.to(tl.float32) * s.to(tl.float32), c.dtype)).to(x.dtype)


@triton.jit
def _store(to, x, mask, scale):
    if to.dtype.element_ty == tl.uint8:
        wide = x.to(tl.float32)
        if scale is not None:
            wide = tl.div_rn(wide, tl.load(scale))
        tl.store(to, e4m3_bits(wide), mask=mask)
    else:
        tl.store(to, x.to(to.dtype.element_ty), mask=mask)


@triton.jit
def e4m3_bits(x):
    """float32 -> the byte of float8_e4m3fn nearest to it, ties to even, beyond 448 the largest; NaN stays one.

    From 2 ** -6 on both kinds of number differ in bias and 20 bits of fraction; below, the byte counts steps of
    2 ** -9, which adding 2 ** 23 rounds to.
    """
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.uint32, bitcast=True) - (120 << 23)
    code = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    steps = (size * 512.0 + 8388608.0).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(size < 0.015625, steps, code)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((x.to(tl.uint32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
