"""Blocks of every type of ggml, of random bits: the package `gguf` says which values they are."""

from __future__ import annotations

import ggml_pack
import gguf
import numpy as np
import pytest
import torch

from fuseline.compile.gguf.block_types import BLOCK_TYPES, PLAIN
from fuseline.compile.gguf.blocks import BLOCK_FORMATS, dequantize_blocks
from fuseline.compile.ops.coded import dequantize, parse_layout

HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ2_0": (64,), "MXFP4": (), "TQ1_0": (52,),
          "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}  # fmt: skip
"""Bytes of a block where a half of random bits might be no number; others: byte 0."""
DEQUANTIZED = {"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "TQ1_0"}


def random_blocks(name: str, num_bytes: int) -> np.ndarray:
    """[5 outputs, 3 blocks]."""
    random = np.random.default_rng(len(name) + num_bytes)
    raw = random.integers(0, 256, (5, 3, num_bytes), dtype=np.uint8)
    for at in HALVES.get(name, (0,)):
        raw[..., at : at + 2] = random.normal(size=(5, 3, 1)).astype(np.float16).view(np.uint8)
    if name == "IQ1_M":  # the bits of its half are spread over 8 bytes
        raw[..., 48:56] &= 0x3F
    return raw.reshape(5, -1)


def test_sizes_are_those_of_the_package() -> None:
    for number, block in BLOCK_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (block.size, block.num_bytes)
        assert gguf.GGMLQuantizationType(number).name == block.name
    assert {block.name for block in BLOCK_TYPES.values()} == {*BLOCK_FORMATS, *PLAIN, *DEQUANTIZED}


@pytest.mark.parametrize("name", sorted({*BLOCK_FORMATS, *DEQUANTIZED}))
def test_values_are_those_of_the_package_bit_for_bit(name: str) -> None:
    block = next(block for block in BLOCK_TYPES.values() if block.name == name)
    raw = random_blocks(name, block.num_bytes)
    want = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[name]))
    assert want.isfinite().all() and want.unique().numel() > 3
    if name in DEQUANTIZED:
        assert torch.equal(dequantize_blocks(name, torch.from_numpy(raw)), want)
        return
    form = BLOCK_FORMATS[name]
    coded = form.decode(torch.from_numpy(raw).unflatten(-1, (-1, block.num_bytes)))
    assert torch.equal(dequantize(coded, form.layout), want)
    assert parse_layout(str(form.layout)) == form.layout
    assert (coded.zeros is not None) == form.layout.has_zeros


@pytest.mark.parametrize(("name", "error"), [
    ("Q2_K", 0.33), ("Q3_K", 0.16), ("Q4_K", 0.08), ("Q5_K", 0.04), ("Q6_K", 0.02), ("IQ4_NL", 0.09), ("IQ4_XS", 0.09),
])  # fmt: skip
def test_what_the_tests_pack_is_near_the_values(name: str, error: float) -> None:
    values = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    found = gguf.dequantize(ggml_pack.PACKERS[name](values), gguf.GGMLQuantizationType[name])
    assert np.linalg.norm(found - values) < error * np.linalg.norm(values)
