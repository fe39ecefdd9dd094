"""Quantizers of block types that the package `gguf` reads, but does not write: rounded to the nearest, no more.

From [N, K] float32 to [N, bytes of a row] uint8; the layouts are those of ggml-common.h. Whether a block is right, the
package says: its dequantization must be near the values.
"""

from __future__ import annotations

import numpy as np

Blocks = np.ndarray


def half(values: np.ndarray) -> np.ndarray:
    """[...] -> [..., 2] bytes of float16."""
    return values.astype(np.float16)[..., None].view(np.uint8)


def as_read(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def over(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.divide(values, scales, out=np.zeros_like(values), where=scales != 0)


def with_minimum(blocks: Blocks, group: int, largest: int, steps: int) -> tuple[np.ndarray, ...]:
    """(codes [B, 256], d, dmin [B], scales, least [B, 256 / group]): x = d * scale * code - dmin * least."""
    parts = blocks.reshape(len(blocks), -1, group)
    least = np.maximum(-parts.min(-1), 0)
    widths = (parts.max(-1) + least) / largest
    d, dmin = (as_read(values.max(-1) / steps) for values in (widths, least))
    scales, mins = (np.rint(over(v, np.broadcast_to(s[:, None], v.shape))).clip(0, steps).astype(np.uint8)
                    for v, s in ((widths, d), (least, dmin)))  # fmt: skip
    real = (d[:, None] * scales)[..., None]
    codes = np.rint(over(parts + (dmin[:, None] * mins)[..., None], np.broadcast_to(real, parts.shape)))
    return codes.clip(0, largest).astype(np.uint8).reshape(blocks.shape), d, dmin, scales, mins


def symmetric(blocks: Blocks, low: int, steps: int) -> tuple[np.ndarray, ...]:
    """(codes from `low` on [B, 256], d [B], scales [B, 16]): x = d * scale * code; scales from -steps to steps - 1."""
    parts = blocks.reshape(len(blocks), 16, 16)
    extreme = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], -1)[..., 0]
    widths = extreme / low
    d = as_read(np.abs(widths).max(-1) / (steps - 1))
    scales = np.rint(over(widths, np.broadcast_to(d[:, None], widths.shape))).astype(np.int8)
    real = (d[:, None] * scales)[..., None]
    codes = np.rint(over(parts, np.broadcast_to(real, parts.shape))).clip(low, -low - 1)
    return codes.astype(np.int8).reshape(blocks.shape), d, scales


def in_bits(codes: np.ndarray, width: int) -> np.ndarray:
    """[B, P, 8 / width, n] -> [B, P * n]: the first of n codes in the lowest bits of n bytes, ..."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(codes << shifts, axis=-2).reshape(len(codes), -1)


def k_scales(scales: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Two times 8 numbers of 6 bits in 12 bytes."""
    first, second = scales[:, :4] | (scales[:, 4:] >> 4) << 6, least[:, :4] | (least[:, 4:] >> 4) << 6
    return np.concatenate((first, second, scales[:, 4:] & 15 | (least[:, 4:] & 15) << 4), -1)


def q2_k(blocks: Blocks) -> np.ndarray:
    codes, d, dmin, scales, least = with_minimum(blocks, 16, 3, 15)
    return np.concatenate((scales | least << 4, in_bits(codes.reshape(-1, 2, 4, 32), 2), half(d), half(dmin)), -1)


def q3_k(blocks: Blocks) -> np.ndarray:
    codes, d, scales = symmetric(blocks, -4, 32)
    values, six = (codes + 4).astype(np.uint8), (scales + 32).astype(np.uint8)
    low = six[:, :8] & 15 | (six[:, 8:] & 15) << 4
    high = in_bits((six >> 4).reshape(-1, 1, 4, 4), 2)
    third = in_bits((values >> 2).reshape(-1, 1, 8, 32), 1)
    return np.concatenate((third, in_bits((values & 3).reshape(-1, 2, 4, 32), 2), low, high, half(d)), -1)


def q4_k(blocks: Blocks) -> np.ndarray:
    codes, d, dmin, scales, least = with_minimum(blocks, 32, 15, 63)
    return np.concatenate((half(d), half(dmin), k_scales(scales, least), in_bits(codes.reshape(-1, 4, 2, 32), 4)), -1)


def q5_k(blocks: Blocks) -> np.ndarray:
    codes, d, dmin, scales, least = with_minimum(blocks, 32, 31, 63)
    low, high = in_bits((codes & 15).reshape(-1, 4, 2, 32), 4), in_bits((codes >> 4).reshape(-1, 1, 8, 32), 1)
    return np.concatenate((half(d), half(dmin), k_scales(scales, least), high, low), -1)


def q6_k(blocks: Blocks) -> np.ndarray:
    codes, d, scales = symmetric(blocks, -32, 128)
    values = (codes + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = in_bits((values & 15).reshape(-1, 2, 2, 64), 4)
    return np.concatenate((low, in_bits(values >> 4, 2), scales.view(np.uint8), half(d)), -1)


def iq4(blocks: Blocks, table: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Codes of the nearest values of a table times d [B, 1]."""
    near = np.abs(over(blocks, np.broadcast_to(d, blocks.shape))[..., None] - table)
    return near.argmin(-1).astype(np.uint8)


def iq4_nl(blocks: Blocks) -> np.ndarray:
    import gguf

    table = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
    d = as_read(np.abs(blocks).max(-1, keepdims=True) / 127)
    return np.concatenate((half(d[:, 0]), in_bits(iq4(blocks, table, d).reshape(-1, 1, 2, 16), 4)), -1)


def iq4_xs(blocks: Blocks) -> np.ndarray:
    import gguf

    table, parts = np.array(gguf.quants.IQ4_NL.kvalues, np.float32), blocks.reshape(-1, 8, 32)
    widths = np.abs(parts).max(-1) / 127
    d = as_read(widths.max(-1) / 31)
    scales = np.rint(over(widths, np.broadcast_to(d[:, None], widths.shape))).clip(-32, 31)
    codes = iq4(parts.reshape(-1, 32), table, (d[:, None] * scales).reshape(-1, 1).astype(np.float32))
    six = (scales + 32).astype(np.uint8)
    high = in_bits((six >> 4).reshape(-1, 2, 4, 1), 2)
    low = six[:, ::2] & 15 | (six[:, 1::2] & 15) << 4
    return np.concatenate((half(d), high, low, in_bits(codes.reshape(-1, 8, 2, 16), 4)), -1)


def rows_of(pack, size: int):
    def packed(values: np.ndarray) -> np.ndarray:
        blocks = pack(values.reshape(-1, size).astype(np.float32))
        return np.ascontiguousarray(blocks).reshape(*values.shape[:-1], -1)

    return packed


PACKERS = {
    "Q2_K": rows_of(q2_k, 256), "Q3_K": rows_of(q3_k, 256), "Q4_K": rows_of(q4_k, 256), "Q5_K": rows_of(q5_k, 256),
    "Q6_K": rows_of(q6_k, 256), "IQ4_NL": rows_of(iq4_nl, 32), "IQ4_XS": rows_of(iq4_xs, 256),
}  # fmt: skip
