"""linear_codes on every instruction set: a row's bits depend on the row alone, and odd calls give what they should."""

from __future__ import annotations

import pytest
import torch
from native_fixtures import FLOATS, isa, ops, with_threads

from fuseline.compile.ops.coded import KINDS
from fuseline.compile.ops.library import Make
from fuseline.compile.ops.linear_codes import linear_codes, random_weight, to_panels, to_words

__all__ = ["isa"]
NUM_IN, NUM_OUT = 1090, 333
KIND_GROUPS = [("int8", 128, True), ("int8", 0, False), ("fp8", 0, True), ("int4", 32, True), ("nf4", 64, False)]


def weight_of(kind: str, group: int, has_zeros: bool, num_in: int = NUM_IN) -> tuple:
    make = Make(torch.float16, torch.Generator().manual_seed(3))
    return random_weight(make, kind, group, NUM_OUT, num_in, has_zeros)


def run(x: torch.Tensor, parts: tuple, group: int, kind: str, order: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((*x.shape[:-1], NUM_OUT), float("nan"), dtype=torch.float32)
    ops.linear_codes(out, x, *parts, order, None, NUM_OUT, group, KINDS[kind])
    return out


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "group", "has_zeros"), KIND_GROUPS)
def test_a_row_does_not_depend_on_its_batch_or_on_threads(isa, kind, group, has_zeros, dtype):
    x = torch.randn(300, NUM_IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    parts, order = weight_of(kind, group, has_zeros), torch.randperm(NUM_IN)
    whole = run(x, parts, group, kind, order)
    assert torch.equal(whole, with_threads(2, lambda: run(x, parts, group, kind, order)))
    for begin, end in [(0, 1), (299, 300), (7, 9), (20, 24), (30, 37), (0, 64), (100, 115), (60, 300)]:
        part = with_threads(1 + begin % 2, lambda b=begin, e=end: run(x[b:e], parts, group, kind, order))
        assert torch.equal(part, whole[begin:end]), (begin, end)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_has_its_value(isa, kind):
    """Each of 256 or 16 codes times 1, alone in its group."""
    bits = 8 if kind in ("int8", "fp8") else 4
    codes = torch.arange(1 << bits).repeat(16 * 8 // (1 << bits) + 1)[: 16 * 8].reshape(16, 8).to(torch.uint8)
    for first in range(0, 256, 128):
        block = codes + (first if bits == 8 else 0)
        block = torch.where(block & 127 == 127, 0, block) if kind == "fp8" else block
        check_values(kind, block)


def check_values(kind: str, codes: torch.Tensor) -> None:
    bits, num_out = (8 if kind in ("int8", "fp8") else 4), len(codes)
    parts = to_panels(to_words(codes, bits)), torch.ones(1, 1, 16), None
    for dtype in FLOATS:
        x = torch.eye(8).to(dtype)
        out = torch.empty(8, num_out, dtype=torch.float32)
        ops.linear_codes(out, x, *parts, None, None, num_out, 0, KINDS[kind])
        want = linear_codes(x.double(), parts[0], parts[1].double(), None, None, None, num_out, 0, KINDS[kind])
        rounded = want.to(dtype).float() if kind in ("nf4", "fp4") else want.float()
        assert torch.equal(out, rounded)


def test_strided_rows_and_none(isa):
    parts = weight_of("int8", 128, False)
    x = torch.randn(4, 5, 2 * NUM_IN)
    want = run(x[..., :NUM_IN].contiguous(), parts, 128, "int8")
    assert torch.equal(run(x[..., :NUM_IN], parts, 128, "int8"), want)
    assert run(x[:0, 0, :NUM_IN], parts, 128, "int8").shape == (0, NUM_OUT)


def test_ids_outside_a_weight_read_as_zeros(isa):
    codes, scales, _ = weight_of("int8", 128, False)
    out = torch.full((3, NUM_IN), float("nan"), dtype=torch.float16)
    ops.embedding_codes(out, torch.tensor([0, -1, 1 << 40]), codes, scales, None, NUM_IN, 128, KINDS["int8"])
    assert out[0].abs().sum() > 0 and (out[1:] == 0).all()
