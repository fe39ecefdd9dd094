"""Blocks of ggml as codes and scales. A row of a weight is blocks one after the other, each a few fields of bytes.

Decoders take [N, B, bytes of a block] uint8 and give the weight's codes [N, K], scales [N, G] and, where codes count
up, the least value of each group. The layouts are those of ggml-common.h (https://github.com/ggml-org/llama.cpp);
products of a block's scale, a half of 11 bits, and a group's, an integer of at most 8, are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.ops.packed_bits import unpack_bytes


@dataclass(frozen=True)
class BlockFormat:
    """How blocks of a type are kept."""

    layout: Layout
    decode: Callable[[Tensor], Coded]
    """From [N, B, bytes of a block]."""


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block: [N, B, 1]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)


def _nibbles(packed: Tensor, run: int = 16) -> Tensor:
    """[..., n] bytes -> [..., 2 n]: of each run the lower halves of all, then the upper ones."""
    return unpack_bytes(packed, 4, run)


def _high_bits(blocks: Tensor, at: int) -> Tensor:
    """The fifth bits of 32 values, in 4 bytes in the order of the values."""
    return unpack_bytes(blocks[..., at : at + 4], 1) << 4


def _coded(codes: Tensor, scales: Tensor, least: Tensor | None = None) -> Coded:
    """Of codes [N, B, size of a block], scales and least values [N, B, groups of a block]."""
    return Coded(codes.flatten(1), scales.flatten(1), None if least is None else least.flatten(1))


def _signed(codes: Tensor, half: int) -> Tensor:
    return codes.view(torch.int8) - half


def _q4_0(blocks: Tensor) -> Coded:
    return _coded(_nibbles(blocks[..., 2:]), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Coded:
    return _coded(_nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Tensor) -> Coded:
    return _coded(_signed(_nibbles(blocks[..., 6:]) | _high_bits(blocks, 2), 16), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Coded:
    codes = _nibbles(blocks[..., 8:]) | _high_bits(blocks, 4)
    return _coded(codes.view(torch.int8), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Coded:
    return _coded(blocks[..., 2:].contiguous().view(torch.int8), _half(blocks, 0))


def _q2_k(blocks: Tensor) -> Coded:
    """scales[16]: of a group the scale's 4 bits, above them the least value's; 2 bits a value[64], d, dmin."""
    groups = blocks[..., :16]
    codes = unpack_bytes(blocks[..., 16:80], 2, 32)
    scales, least = _half(blocks, 80).float() * (groups & 15), _half(blocks, 82).float() * (groups >> 4)
    return _coded(codes, scales, -least)


def _q3_k(blocks: Tensor) -> Coded:
    """The third bits[32], where 0 is 4 less; 2 bits a value[64], scales of 6 bits[12], d."""
    codes = unpack_bytes(blocks[..., 32:96], 2, 32) | unpack_bytes(blocks[..., :32], 1, 32) << 2
    low, top = _nibbles(blocks[..., 96:104], 8), unpack_bytes(blocks[..., 104:108], 2, 4)
    scales = _signed(low | top << 4, 32)
    return _coded(codes + 4, _half(blocks, 108).float() * scales)


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and least values of 8 groups, 6 bits each: [..., 12] -> two of [..., 8]."""
    first, second, rest = packed.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((first & 63, rest & 15 | (first >> 6) << 4), -1)
    return scales, torch.cat((second & 63, rest >> 4 | (second >> 6) << 4), -1)


def _of_k(blocks: Tensor, codes: Tensor) -> Coded:
    """Q4_K and Q5_K: d, dmin, scales[12]."""
    scales, least = _k_scales(blocks[..., 4:16])
    return _coded(codes, _half(blocks, 0).float() * scales, -(_half(blocks, 2).float() * least))


def _q4_k(blocks: Tensor) -> Coded:
    return _of_k(blocks, _nibbles(blocks[..., 16:], 32))


def _q5_k(blocks: Tensor) -> Coded:
    codes = _nibbles(blocks[..., 48:], 32) | unpack_bytes(blocks[..., 16:48], 1, 32) << 4
    return _of_k(blocks, codes.view(torch.int8))


def _q6_k(blocks: Tensor) -> Coded:
    """4 bits a value[128], 2 bits a value[64], scales[16] int8, d."""
    codes = _nibbles(blocks[..., :128], 64) | unpack_bytes(blocks[..., 128:192], 2, 32) << 4
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    return _coded(_signed(codes, 32), _half(blocks, 208).float() * scales)


def _iq4_xs(blocks: Tensor) -> Coded:
    """d, of 8 groups the upper 2 bits of the scales in an integer of 16, the lower 4[4], 4 bits a value[128]."""
    top, low = unpack_bytes(blocks[..., 2:4], 2), unpack_bytes(blocks[..., 4:8], 4)
    codes = _nibbles(blocks[..., 8:])
    return _coded(codes, _half(blocks, 0).float() * _signed(low | top << 4, 32))


def _tq2_0(blocks: Tensor) -> Coded:
    """2 bits a value[64], less one; d."""
    codes = unpack_bytes(blocks[..., :64], 2, 32)
    return _coded(codes + 7, _half(blocks, 64))


def _mxfp4(blocks: Tensor) -> Coded:
    """The exponent of the scale, 127 being 1; 4 bits a value[16]."""
    exponents = blocks[..., :1].to(torch.int32) - 127
    return _coded(_nibbles(blocks[..., 1:]), torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents))


BLOCK_FORMATS: Mapping[str, BlockFormat] = {
    "Q4_0": BlockFormat(Layout("int4", 32), _q4_0),
    "Q4_1": BlockFormat(Layout("uint4", 32, has_zeros=True), _q4_1),
    "Q5_0": BlockFormat(Layout("int8", 32, has_fives=True), _q5_0),
    "Q5_1": BlockFormat(Layout("uint8", 32, has_zeros=True, has_fives=True), _q5_1),
    "Q8_0": BlockFormat(Layout("int8", 32), _q8_0),
    "Q2_K": BlockFormat(Layout("uint4", 16, "float32", has_zeros=True), _q2_k),
    "Q3_K": BlockFormat(Layout("int4", 16, "float32"), _q3_k),
    "Q4_K": BlockFormat(Layout("uint4", 32, "float32", has_zeros=True), _q4_k),
    "Q5_K": BlockFormat(Layout("uint8", 32, "float32", has_zeros=True, has_fives=True), _q5_k),
    "Q6_K": BlockFormat(Layout("int8", 16, "float32"), _q6_k),
    "IQ4_NL": BlockFormat(Layout("lut4", 32, table="iq4nl"), _q4_0),
    "IQ4_XS": BlockFormat(Layout("lut4", 32, "float32", table="iq4nl"), _iq4_xs),
    "TQ2_0": BlockFormat(Layout("int4", 256), _tq2_0),
    "MXFP4": BlockFormat(Layout("lut4", 32, "float32", table="e2m1"), _mxfp4),
}
"""By name of the type. Blocks of other types are dequantized as they are loaded."""


def dequantize_blocks(name: str, raw: Tensor) -> Tensor:
    """Values [N, K] float32 of rows [N, bytes] of a type that has no layout, as the package gguf computes them."""
    import gguf  # only for such types: importing it takes as long as loading a small model

    values = gguf.dequantize(raw.contiguous().numpy(), gguf.GGMLQuantizationType[name])
    return torch.from_numpy(values)
