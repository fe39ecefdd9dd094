"""The layout of a weight that is joined of several stored ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.checkpoint import CodedTensor
from fuseline.compile.capture.coded import layout_of
from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization.published import Published, Tensors

EIGHT, FIVE, OTHER = Layout("int8", 32), Layout("int8", 32, has_fives=True), Layout("int4", 32)


def no_codes(tensors: Tensors) -> Coded:
    raise AssertionError("nothing is read to find a layout")


def stored(name: str, layout: Layout) -> CodedTensor:
    meta = torch.empty(16, 64, device="meta")
    return CodedTensor(name, Path("w"), 0, meta, Published(layout, (16, 64), no_codes), {})


@pytest.mark.parametrize(("layouts", "want"), [
    ((FIVE, FIVE), FIVE), ((FIVE, EIGHT), EIGHT), ((EIGHT, FIVE), EIGHT), ((FIVE, OTHER), None),
])  # fmt: skip
def test_codes_of_5_bits_beside_those_of_8_are_read_as_8(layouts, want):
    parts = [lazy_tensor.whole(stored(f"w{index}", layout)) for index, layout in enumerate(layouts)]
    assert layout_of(lazy_tensor.concatenate(parts, 0)) == want
