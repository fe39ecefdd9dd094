"""unpack_codes, pack_codes and pack_lanes on every instruction set, against plain torch."""

from __future__ import annotations

import pytest
import torch
from native_fixtures import FLOATS, any_isa, isa, ops

from fuseline.compile.formats.panels import PANEL, pack_block, pack_columns, pack_lanes, put_lanes
from fuseline.compile.ops.linear_codes import to_panels, to_words

__all__ = ["any_isa", "isa"]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("run", [1, 4, 16, 32])
def test_unpack_codes(any_isa, bits, run):
    packed = torch.randint(0, 256, (7, 64 + 3), dtype=torch.uint8)[:, :64]
    codes = torch.empty(7, 64 * 8 // bits, dtype=torch.uint8)
    ops.unpack_codes(codes, packed, bits, run)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).unsqueeze(-1)
    want = (packed.unflatten(1, (-1, run)).unsqueeze(-2) >> shifts) & ((1 << bits) - 1)
    assert torch.equal(codes, want.flatten(1))


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize(("num_out", "num_in", "row"), [(45, 75, 0), (33, 300, 5), (16, 896, 16), (3, 8, 20)])
def test_pack_codes(any_isa, bits, num_out, num_in, row):
    """Lanes of other rows stay as they are."""
    codes = torch.randint(0, 1 << bits, (num_out, num_in + 2), dtype=torch.uint8)[:, :num_in]
    words = to_words(codes, bits)
    panels = torch.full((-(-(num_out + row) // PANEL), words.shape[1], PANEL), -1, dtype=torch.int32)
    ops.pack_codes(panels, codes, row, bits)
    lanes = panels.mT.flatten(0, 1)
    assert torch.equal(lanes[row : row + num_out], words)
    assert (lanes[:row] == -1).all() and (lanes[row + num_out :] == -1).all()
    assert row or num_out % PANEL or torch.equal(panels, to_panels(words))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("num_in", [37, 38])
def test_lanes_and_blocks(any_isa, dtype, num_in):
    rows = torch.randn(45, num_in).to(dtype)
    for put, reference in ((put_lanes, pack_lanes), (lambda p, b, n: pack_block(p, b, n, 0), pack_columns)):
        found, want = (torch.zeros(4, num_in, PANEL, dtype=dtype) for _ in range(2))
        put(found, rows, 7)
        reference(want, rows, 7)
        assert torch.equal(found, want)
