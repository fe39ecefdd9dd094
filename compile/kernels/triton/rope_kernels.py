"""The kernels of rope.py, which has the legend."""

from __future__ import annotations

import triton
import triton.language as tl

from fuseline.compile.kernels.triton.lines import rounded
from fuseline.compile.ops import codes

HALF, INTERLEAVED = tl.constexpr(codes.ROPE_HALF), tl.constexpr(codes.ROPE_INTERLEAVED)


@triton.jit
def rope_kernel(
    out, x, cos, sin, rows, out_stride_h, out_stride_t, x_stride_h, x_stride_t, table_stride, H: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PADDED_PAIRS: tl.constexpr, PADDED_REST: tl.constexpr,
    LAYOUT: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, HEADS heads)."""
    t = tl.program_id(0).to(tl.int64)
    line = tl.load(rows + t).to(tl.int64) * table_stride
    _rotate(
        out + t * out_stride_t, out_stride_h, x + t * x_stride_t, x_stride_h, cos + line, sin + line, tl.program_id(1),
        None, H, D, R, C, PADDED_PAIRS, PADDED_REST, LAYOUT, HEADS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["slots"])
def rope_cache_kernel(
    q_out, k_cache, v_cache, q, k, v, cos, sin, rows, slots, out_stride_h, out_stride_t, q_stride_h, q_stride_t,
    k_stride_h, k_stride_t, v_stride_h, v_stride_t, table_stride, k_cache_stride_n, k_cache_stride_h, k_cache_stride_b,
    v_cache_stride_n, v_cache_stride_h, v_cache_stride_b, k_scale, v_scale, Q_PARTS: tl.constexpr,
    KV_PARTS: tl.constexpr, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PADDED_PAIRS: tl.constexpr,
    PADDED_REST: tl.constexpr, LAYOUT: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, HEADS heads): first those of q, to q_out, then those of k and of v, to the caches."""
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    line = tl.load(rows + t).to(tl.int64) * table_stride
    if part < Q_PARTS:
        _rotate(
            q_out + t * out_stride_t, out_stride_h, q + t * q_stride_t, q_stride_h, cos + line, sin + line, part, None,
            H, D, R, C, PADDED_PAIRS, PADDED_REST, LAYOUT, HEADS,
        )  # fmt: skip
    else:
        slot = tl.load(slots + t).to(tl.int64)
        if slot >= 0:
            if part < Q_PARTS + KV_PARTS:
                to = k_cache + slot // B * k_cache_stride_n + slot % B * k_cache_stride_b
                _rotate(
                    to, k_cache_stride_h, k + t * k_stride_t, k_stride_h, cos + line, sin + line, part - Q_PARTS,
                    k_scale, K, D, R, C, PADDED_PAIRS, PADDED_REST, LAYOUT, HEADS,
                )  # fmt: skip
            else:
                to = v_cache + slot // B * v_cache_stride_n + slot % B * v_cache_stride_b
                _copy(to, v_cache_stride_h, v + t * v_stride_t, v_stride_h, part - Q_PARTS - KV_PARTS, v_scale, K, E,
                      PADDED_E, HEADS)  # fmt: skip


@triton.jit(do_not_specialize=["slots"])
def rope_latent_kernel(
    q_out, cache, q_nope, q_pe, latent, k_pe, cos, sin, rows, slots, out_stride_h, out_stride_t, nope_stride_h,
    nope_stride_t, q_stride_h, q_stride_t, latent_stride_h, latent_stride_t, k_stride_h, k_stride_t, table_stride,
    cache_stride_n, cache_stride_h, cache_stride_b, scale, Q_PARTS: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr, B: tl.constexpr, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    PADDED_PAIRS: tl.constexpr, PADDED_REST: tl.constexpr, LAYOUT: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, HEADS heads): first those of q, to q_out, then those of the latent, to the cache."""
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    line = tl.load(rows + t).to(tl.int64) * table_stride
    if part < Q_PARTS:
        to = q_out + t * out_stride_t
        _copy(to, out_stride_h, q_nope + t * nope_stride_t, nope_stride_h, part, None, H, RANK, PADDED_RANK, HEADS)
        _rotate(
            to + RANK, out_stride_h, q_pe + t * q_stride_t, q_stride_h, cos + line, sin + line, part, None, H, D, R, C,
            PADDED_PAIRS, PADDED_REST, LAYOUT, HEADS,
        )  # fmt: skip
    else:
        slot = tl.load(slots + t).to(tl.int64)
        if slot >= 0:
            to = cache + slot // B * cache_stride_n + slot % B * cache_stride_b
            part -= Q_PARTS
            _copy(to, cache_stride_h, latent + t * latent_stride_t, latent_stride_h, part, scale, K, RANK, PADDED_RANK,
                  HEADS)  # fmt: skip
            _rotate(
                to + RANK, cache_stride_h, k_pe + t * k_stride_t, k_stride_h, cos + line, sin + line, part, scale, K,
                D, R, C, PADDED_PAIRS, PADDED_REST, LAYOUT, HEADS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["slots"])
def write_kernel(
    cache, x, slots, x_stride_h, x_stride_t, cache_stride_n, cache_stride_h, cache_stride_b, scale, H: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, B: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, HEADS heads)."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t).to(tl.int64)
    if slot >= 0:
        to = cache + slot // B * cache_stride_n + slot % B * cache_stride_b
        _copy(to, cache_stride_h, x + t * x_stride_t, x_stride_h, tl.program_id(1), scale, H, D, PADDED_D, HEADS)


@triton.jit
def _rotate(
    to, to_stride_h, source, x_stride_h, cos, sin, part, scale, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, PADDED_PAIRS: tl.constexpr, PADDED_REST: tl.constexpr, LAYOUT: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Heads `part` * HEADS and on of one token, by one line of the tables."""
    head = part * HEADS + tl.arange(0, HEADS)[:, None]
    to += head.to(tl.int64) * to_stride_h
    source += head.to(tl.int64) * x_stride_h
    pair = tl.arange(0, PADDED_PAIRS)[None, :]
    there = (head < H) & (pair < R // 2)
    low = 2 * pair if LAYOUT == INTERLEAVED else pair
    high = 2 * pair + 1 if LAYOUT == INTERLEAVED else pair + R // 2
    from_low = 2 * pair if LAYOUT != HALF else pair
    from_high = 2 * pair + 1 if LAYOUT != HALF else pair + R // 2
    low_cos, high_cos = _line(cos, pair, low, high, R, C)
    low_sin, high_sin = _line(sin, pair, low, high, R, C)
    a = tl.load(source + from_low, mask=there, other=0.0)
    b = tl.load(source + from_high, mask=there, other=0.0)
    _store(to + low, _turned(a, low_cos, b, low_sin, -1.0), there, scale)
    _store(to + high, _turned(b, high_cos, a, high_sin, 1.0), there, scale)
    if PADDED_REST > 0:
        rest = R + tl.arange(0, PADDED_REST)[None, :]
        is_rest = (head < H) & (rest < D)
        _store(to + rest, tl.load(source + rest, mask=is_rest, other=0.0), is_rest, scale)


@triton.jit
def _copy(to, to_stride_h, source, x_stride_h, part, scale, H: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
          HEADS: tl.constexpr):  # fmt: skip
    head = part * HEADS + tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, PADDED_D)[None, :]
    there = (head < H) & (dim < D)
    new = tl.load(source + head.to(tl.int64) * x_stride_h + dim, mask=there, other=0.0)
    _store(to + head.to(tl.int64) * to_stride_h + dim, new, there, scale)


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
    dtype: tl.constexpr = to.dtype.element_ty
    if dtype == tl.uint8 or dtype == tl.float8e5:
        wide = x.to(tl.float32)
        if scale is not None:
            wide = tl.div_rn(wide, tl.load(scale))
        if dtype == tl.uint8:
            tl.store(to, fp8_bits(wide, 7, 3, 448.0), mask=mask)
        else:
            tl.store(to, fp8_bits(wide, 15, 2, 57344.0).to(dtype, bitcast=True), mask=mask)
    else:
        tl.store(to, x.to(dtype), mask=mask)


@triton.jit
def fp8_bits(x, BIAS: tl.constexpr, FRACTION: tl.constexpr, LARGEST: tl.constexpr):
    """float32 -> the byte of fp8 nearest to it, ties to even, beyond LARGEST that; NaN stays one.

    FRACTION: bits behind those of the exponent, whose bias is BIAS. Normal numbers differ from float32's in bias and
    bits of fraction; below them, the byte counts steps, which adding 2 ** 23 rounds to.
    """
    DROPPED: tl.constexpr = 23 - FRACTION
    size = tl.minimum(tl.abs(x), LARGEST)
    bits = size.to(tl.uint32, bitcast=True) - ((127 - BIAS) << 23)
    code = (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED
    of_normal = size * (1 << (BIAS - 1))  # in units of the smallest normal number
    steps = (of_normal * (1 << FRACTION) + 8388608.0).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(of_normal < 1.0, steps, code)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((x.to(tl.uint32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
