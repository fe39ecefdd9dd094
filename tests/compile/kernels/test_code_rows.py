"""Products with weights of codes on a GPU: every kind, group and shape of the C++ kernel; what both kernels keep."""

from __future__ import annotations

import cuda_emulator
import pytest
import torch
import triton_interpreter
from declared import declared
from native_fixtures import FLOATS
from ops_cases import assert_close

from fuseline.compile.kernels.cuda import linear_codes
from fuseline.compile.kernels.triton import code_linear
from fuseline.compile.ops.code_rows import code_parts, from_rows, linear_code_rows, to_rows
from fuseline.compile.ops.coded import KINDS, TABLES
from fuseline.compile.ops.library import Make

__all__ = ["triton_interpreter"]
HALF = FLOATS[1:]
SHAPES = [(1, 8), (33, 264), (20, 1160)]
"""(N, K): one group and many, turns of the loop and a cut one."""


def make(dtype: torch.dtype = torch.bfloat16) -> Make:
    return Make(dtype, torch.Generator().manual_seed(5))


def weight(m: Make, kind: str, group: int, num_out: int, num_in: int, zeros: bool = False) -> tuple:
    """Arguments of the op after x, without bias and order."""
    return *code_parts(m, kind, group, num_out, num_in, zeros), None, None, group, KINDS[kind]


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("num_in", (1, 16, 75, 128, 300))
def test_codes_in_rows_are_the_codes(bits: int, num_in: int):
    codes = make().ids(1 << bits, 3, num_in).to(torch.uint8)
    words = to_rows(codes, bits)
    assert words.shape[1] * 4 % (64 if bits == 4 else 16) == 0
    assert torch.equal(from_rows(words, bits)[:, :num_in], codes)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("group", (0, 32, 64, 128, 512))
@pytest.mark.parametrize("kind", ("int8", "fp8", "int4", "nf4"))
def test_few_rows_of_every_kind(kind: str, group: int, dtype: torch.dtype):
    """With zeros and without, a scale of each dtype, and a bias."""
    m = make(dtype)
    for (num_out, num_in), zeros, scale_dtype in zip(SHAPES, (False, True, False), FLOATS, strict=True):
        codes, scales, zero, table, *rest = weight(m, kind, group, num_out, num_in, zeros and kind != "nf4")
        parts = codes, scales.to(scale_dtype), None if zero is None else zero.to(scale_dtype), table
        args = (*parts, None, m.normal(num_out), *rest[2:])
        is_taken = declared("cuda")["linear_code_rows"].supports(m.normal(1, num_in), *args)
        assert is_taken == (group != 32 or kind not in ("int8", "fp8"))
        for rows in (1, 9) if is_taken else ():
            x = m.normal(rows, 2 * num_in)[:, num_in:]
            found = cuda_emulator.run(linear_codes.linear_code_rows, x, *args)
            assert_close(found, linear_code_rows(x, *args), 1.0)


@pytest.mark.parametrize("table", TABLES)
def test_every_value_of_a_table(table: str):
    """Each code once, by its own input."""
    m = make()
    _, scales, _, values, *rest = weight(m, table, 0, 16, 16)
    codes = to_rows(torch.arange(16).repeat(16, 1).byte(), 4)
    x = torch.eye(16, dtype=torch.bfloat16)
    args = (codes, torch.ones_like(scales), None, values, *rest)
    want = values.to(torch.bfloat16)[:, None].expand(16, 16)
    assert torch.equal(cuda_emulator.run(linear_codes.linear_code_rows, x, *args), want)
    assert torch.equal(code_linear.linear_code_rows(x, *args), want)


@pytest.mark.parametrize("kind", ("int8", "int4"))
def test_a_row_does_not_depend_on_the_others(kind: str):
    m = make()
    x, args = m.normal(16, 1160), weight(m, kind, 128, 24, 1160, True)
    for run in (
        lambda x: cuda_emulator.run(linear_codes.linear_code_rows, x, *args),
        lambda x: code_linear.linear_code_rows_invariant(x, *args),
    ):
        whole = run(x)
        for rows in (slice(0, 1), slice(3, 12)):
            assert torch.equal(run(x[rows]), whole[rows])


def test_what_is_not_taken_is_tritons():
    m = make()
    args = weight(m, "int4", 32, 24, 136)
    wide = m.normal(2, 137)
    for x in (m.normal(17, 136), wide[:, 1:], m.normal(0, 136), m.normal(2, 272)[:, ::2]):
        found = cuda_emulator.run(linear_codes.linear_code_rows, x, *args)
        assert_close(found, linear_code_rows(x, *args), 24.0, 2.0)
    supports = declared("cuda")["linear_code_rows"].supports
    assert not supports(m.normal(1, 136).float(), *args) and not supports(m.normal(1, 132), *args)
    assert not supports(m.normal(1, 136), *args[:5], torch.zeros(24), *args[6:])


@pytest.mark.parametrize("tile", code_linear.TILES, ids=str)
def test_products_by_any_tile(tile):
    m = make()
    x, args = m.normal(40, 300), weight(m, "int4", 64, 150, 300, True)
    found = code_linear.linear_code_rows(x, *args, tile=tile)
    assert_close(found, linear_code_rows(x, *args), 24.0, 2.0)
    assert torch.equal(code_linear.linear_code_rows(x[:3], *args, tile=tile), found[:3])


def test_a_weight_is_decoded_in_parts(monkeypatch):
    monkeypatch.setattr(code_linear, "DECODED_BYTES", 128 * 72 * 2)
    m = make()
    x, args = m.normal(3, 72), weight(m, "fp8", 0, 300, 72)
    bias = m.normal(300)
    args = (*args[:5], bias, *args[6:])
    assert_close(code_linear.linear_decoded(x, *args), linear_code_rows(x, *args), 24.0, 2.0)
