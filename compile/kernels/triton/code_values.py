"""Codes of weights (ops/code_rows.py) to numbers in registers, by arithmetic that every GPU has."""

from __future__ import annotations

import triton
import triton.language as tl

from fuseline.compile.ops.coded import KINDS

INT8, FP8 = tl.constexpr(KINDS["int8"]), tl.constexpr(KINDS["fp8"])
MAGIC = tl.constexpr(0x4B000000)  # 2^23 as a float32, whose lowest bits are the units
WORD = tl.constexpr(8)  # codes of 4 bits


@triton.jit
def load_values(codes, line, there, first, K: tl.constexpr, DEPTH: tl.constexpr, KIND: tl.constexpr, table):
    """float32 [COLUMNS, DEPTH]: values of inputs first .. first + DEPTH - 1 of the outputs whose words (bytes of 8-bit
    kinds) begin at codes + line. `there`: outputs that exist. Inputs from K on are any finite numbers."""
    if KIND == INT8 or KIND == FP8:
        k = first + tl.arange(0, DEPTH)
        is_code = there[:, None] if K % DEPTH == 0 else there[:, None] & (k < K)[None, :]
        byte = tl.load(codes + line[:, None] + k[None, :], mask=is_code, other=0).to(tl.int32)
        if KIND == INT8:
            return ((byte ^ 0x80) | MAGIC).to(tl.float32, bitcast=True) - 8388736.0
        # The bits of an e4m3, moved into an fp16, are the number over 256.
        half = ((byte & 0x80) << 8 | (byte & 0x7F) << 7).to(tl.int16).to(tl.float16, bitcast=True)
        return half.to(tl.float32) * 256.0
    else:
        words: tl.constexpr = DEPTH // WORD
        at = first // WORD + tl.arange(0, words)
        word = tl.load(codes + line[:, None] + at[None, :], mask=there[:, None], other=0)
        # Inputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on.
        even = tl.join(tl.join(word, word >> 8), tl.join(word >> 4, word >> 12))
        odd = tl.join(tl.join(word >> 16, word >> 24), tl.join(word >> 20, word >> 28))
        code = tl.join(even, odd) & 15
        if table is not None:
            # Loads of single values would be fetched ahead as if they were far.
            values = tl.load(table + tl.arange(0, 16))
            code = tl.reshape(code, [line.shape[0], DEPTH])
            value = tl.gather(tl.broadcast_to(values[None, :], [line.shape[0], 16]), code, 1)
        else:
            value = (code | MAGIC).to(tl.float32, bitcast=True) - 8388616.0
        # Words (t, i) of a block back to (i, t).
        value = tl.reshape(value, [line.shape[0], words // 16, 4, 4, WORD])
        return tl.reshape(tl.permute(value, (0, 1, 3, 2, 4)), [line.shape[0], DEPTH])


@triton.jit
def load_of_groups(of, column, there, first, stride, GROUP: tl.constexpr, DEPTH: tl.constexpr, G: tl.constexpr):
    """float32 [COLUMNS, DEPTH] or [COLUMNS, 1]: scales (or zeros) [G, N'] of inputs first .. first + DEPTH - 1."""
    if GROUP == 0:
        return tl.load(of + column, mask=there, other=0.0).to(tl.float32)[:, None]
    elif GROUP >= DEPTH:
        at = first // GROUP * stride + column
        return tl.load(of + at, mask=there, other=0.0).to(tl.float32)[:, None]
    else:
        groups: tl.constexpr = DEPTH // GROUP
        nth = first // GROUP + tl.arange(0, groups)
        at = column[:, None] + nth[None, :] * stride
        found = tl.load(of + at, mask=there[:, None] & (nth < G)[None, :], other=0.0).to(tl.float32)
        spread = tl.broadcast_to(found[:, :, None], [column.shape[0], groups, GROUP])
        return tl.reshape(spread, [column.shape[0], DEPTH])


@triton.jit
def load_weight(
    codes, scales, zeros, table, line, column, there, first, scale_stride, dtype: tl.constexpr, K: tl.constexpr,
    G: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """[COLUMNS, DEPTH] of a weight, in a dtype; without its scales where a row has one (GROUP 0)."""
    value = load_values(codes, line, there, first, K, DEPTH, KIND, table)
    if table is not None:
        value = value.to(dtype).to(tl.float32)
    if zeros is not None:
        value -= load_of_groups(zeros, column, there, first, scale_stride, GROUP, DEPTH, G)
    if GROUP > 0:
        value *= load_of_groups(scales, column, there, first, scale_stride, GROUP, DEPTH, G)
    return value.to(dtype)
