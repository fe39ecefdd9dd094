"""linear_codes on every instruction set: a row's bits depend on the row alone, and odd calls give what they should."""

from __future__ import annotations

import pytest
import torch
from native_fixtures import FLOATS, any_isa, isa, ops, with_threads
from ops_cases import assert_kernels_agree

from fuseline import _C
from fuseline.compile.ops.coded import KINDS
from fuseline.compile.ops.library import Make
from fuseline.compile.ops.linear_codes import bits_of, linear_codes, random_weight, to_panels, to_words
from fuseline.compile.ops.registry import registry

__all__ = ["any_isa", "isa"]
NUM_IN, NUM_OUT = 1090, 333
KIND_GROUPS = [
    ("int8", 128, True), ("int8", 0, False), ("fp8", 0, True), ("int4", 32, True), ("nf4", 64, False),
    ("uint4", 32, True), ("uint8", 16, True), ("int5", 32, False), ("uint5", 64, True),
]  # fmt: skip


def weight_of(kind: str, group: int, has_zeros: bool, num_in: int = NUM_IN) -> tuple:
    make = Make(torch.float16, torch.Generator().manual_seed(3))
    return random_weight(make, kind, group, NUM_OUT, num_in, has_zeros)


def run(x: torch.Tensor, parts: tuple, group: int, kind: str, order: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((*x.shape[:-1], NUM_OUT), float("nan"), dtype=torch.float32)
    ops.linear_codes(out, x, *parts, order, None, NUM_OUT, group, KINDS[kind])
    return out


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "group", "has_zeros"), KIND_GROUPS)
def test_a_row_does_not_depend_on_its_batch_or_on_threads(any_isa, kind, group, has_zeros, dtype):
    x = torch.randn(300, NUM_IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    parts, order = weight_of(kind, group, has_zeros), torch.randperm(NUM_IN)
    whole = run(x, parts, group, kind, order)
    assert torch.equal(whole, with_threads(2, lambda: run(x, parts, group, kind, order)))
    for begin, end in [(0, 1), (299, 300), (7, 9), (20, 24), (30, 37), (0, 64), (100, 115), (60, 300)]:
        part = with_threads(1 + begin % 2, lambda b=begin, e=end: run(x[b:e], parts, group, kind, order))
        assert torch.equal(part, whole[begin:end]), (begin, end)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_has_its_value(any_isa, kind):
    """Each of 256, 32 or 16 codes times 1, alone in its group."""
    bits = bits_of(kind)
    codes = torch.arange(1 << bits).repeat(16 * 8 // (1 << bits) + 1)[: 16 * 8].reshape(16, 8).to(torch.uint8)
    for first in range(0, 256, 128):
        block = codes + (first if bits == 8 else 0)
        block = torch.where(block & 127 == 127, 0, block) if kind == "fp8" else block
        check_values(kind, block)


def check_values(kind: str, codes: torch.Tensor) -> None:
    bits, num_out = bits_of(kind), len(codes)
    parts = to_panels(to_words(codes, bits)), torch.ones(1, 1, 16), None
    for dtype in FLOATS:
        x = torch.eye(8).to(dtype)
        out = torch.empty(8, num_out, dtype=torch.float32)
        ops.linear_codes(out, x, *parts, None, None, num_out, 0, KINDS[kind])
        want = linear_codes(x.double(), parts[0], parts[1].double(), None, None, None, num_out, 0, KINDS[kind])
        rounded = want.to(dtype).float() if kind in ("nf4", "fp4") else want.float()
        assert torch.equal(out, rounded)


def test_strided_rows_and_none(any_isa):
    parts = weight_of("int8", 128, False)
    x = torch.randn(4, 5, 2 * NUM_IN)
    want = run(x[..., :NUM_IN].contiguous(), parts, 128, "int8")
    assert torch.equal(run(x[..., :NUM_IN], parts, 128, "int8"), want)
    assert run(x[:0, 0, :NUM_IN], parts, 128, "int8").shape == (0, NUM_OUT)


# Inputs of half precision as integers of 15 bits by block, where the instruction set has fast products of integers.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_kernel_agrees_with_its_reference(any_isa, dtype):
    assert_kernels_agree(registry()["linear_codes"], dtype)


HALVES = (torch.bfloat16, torch.float16)
INTEGER_GROUPS = [
    ("int8", 128, True), ("int8", 0, False), ("int8", 512, False), ("int4", 8, False), ("uint4", 32, True),
    ("int5", 32, False), ("uint5", 32, True),
]  # fmt: skip


def exact(x: torch.Tensor, parts: tuple, group: int, kind: str) -> torch.Tensor:
    codes, *rest = parts
    rest = (None if part is None else part.double() for part in rest)
    return linear_codes(x.double(), codes, *rest, None, None, NUM_OUT, group, KINDS[kind])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("kind", "group", "has_zeros"), INTEGER_GROUPS)
def test_inputs_within_a_factor_of_64_are_exact(any_isa, kind, group, has_zeros, dtype):
    """Their products are: what differs from float64 is the sum of float32, a few of its roundings."""
    generator = torch.Generator().manual_seed(5)
    steps = torch.randint(128, 256, (30, NUM_IN), generator=generator) / 128
    x = steps * 2.0 ** torch.randint(-3, 3, (30, NUM_IN), generator=generator)
    x = (x * torch.randint(0, 2, (30, NUM_IN), generator=generator).mul(2).sub(1)).to(dtype)
    parts = weight_of(kind, group, has_zeros)
    torch.testing.assert_close(run(x, parts, group, kind).double(), exact(x, parts, group, kind), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("kind", "group", "has_zeros"), INTEGER_GROUPS)
def test_a_large_input_costs_its_block_alone_precision(any_isa, kind, group, has_zeros, dtype):
    x = torch.randn(16, NUM_IN, generator=torch.Generator().manual_seed(6)).to(dtype)
    x[:, 70] = 3000.0
    parts = weight_of(kind, group, has_zeros)
    error = (run(x, parts, group, kind).double() - exact(x, parts, group, kind)).abs()
    # Half a step of 15 bits for each input of a block of at most 128, and as many roundings of float32 as blocks.
    weight = exact(torch.eye(NUM_IN), parts, group, kind).T.abs()
    block = min(group or 128, 128)
    most = x.double().abs().split(block, 1)
    bound = sum(part.amax(1, keepdim=True) * w.sum(1) for part, w in zip(most, weight.split(block, 1), strict=True))
    assert (error <= bound * 2.0**-14 + 1e-5 * (x.double().abs() @ weight.T)).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ("int8", "int4", "uint4", "int5", "uint5"))
def test_a_row_of_halves_that_is_not_finite_stays_so_and_others_stay_finite(any_isa, kind, dtype):
    x, parts = torch.randn(40, NUM_IN).to(dtype), weight_of(kind, 32, kind.startswith("uint"))
    largest, least = min(1e20, torch.finfo(dtype).max), torch.finfo(dtype).smallest_normal
    x[0, 3], x[1, 5], x[2], x[3], x[4, 9] = torch.nan, torch.inf, 0, least, largest
    for rows in (x, x[:5]):
        out = run(rows, parts, 32, kind)
        assert not out[:2].isfinite().any() and (out[2] == 0).all() and out[3:].isfinite().all()
        assert out[3].abs().max() < 1e-2


def test_ids_outside_a_weight_read_as_zeros(isa):
    codes, scales, _ = weight_of("int8", 128, False)
    out = torch.full((3, NUM_IN), float("nan"), dtype=torch.float16)
    ops.embedding_codes(out, torch.tensor([0, -1, 1 << 40]), codes, scales, None, NUM_IN, 128, KINDS["int8"])
    assert out[0].abs().sum() > 0 and (out[1:] == 0).all()


# Rows quantized to int8.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_int8_kernel_agrees_with_its_reference(any_isa, dtype):
    assert_kernels_agree(registry()["linear_codes_int8"], dtype)


def run_int8(x: torch.Tensor, parts: tuple, group: int, kind: str, x_scale: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((*x.shape[:-1], NUM_OUT), float("nan"), dtype=torch.float32)
    ops.linear_codes_int8(out, x, *parts, None, None, x_scale, NUM_OUT, group, KINDS[kind])
    return out


INT8_GROUPS = [("int8", 128), ("int8", 0), ("int8", 8), ("int4", 32), ("int4", 64)]


@pytest.mark.parametrize(("kind", "group"), INT8_GROUPS)
def test_an_int8_row_does_not_depend_on_its_batch_or_on_threads(any_isa, kind, group):
    x = torch.randn(300, NUM_IN, generator=torch.Generator().manual_seed(1))
    parts = weight_of(kind, group, has_zeros=group == 128)
    whole = run_int8(x, parts, group, kind)
    for begin, end in [(0, 1), (7, 9), (20, 24), (100, 115), (30, 60), (60, 300)]:
        part = with_threads(1 + begin % 2, lambda b=begin, e=end: run_int8(x[b:e], parts, group, kind))
        assert torch.equal(part, whole[begin:end]), (begin, end)


def test_sums_of_integers_are_the_same_on_every_instruction_set():
    """Of one group, so that nothing but integers is added; extremes, which saturating instructions would clip."""
    x = torch.tensor([127.5, -127.5]).repeat(40, 300)
    codes = torch.tensor([-128, -128, 127, -128]).repeat(NUM_OUT, 150).to(torch.int8)
    parts = to_panels(to_words(codes, 8)), torch.ones(-(-NUM_OUT // 16), 1, 16), None
    want = torch.stack((x.clamp(-128, 127).round()[0] @ codes[0].float(),) * NUM_OUT).expand(40, -1)
    before = _C.cpu_isa()
    for isa_name in _C.available_isas():
        _C.set_cpu_isa(isa_name)
        assert torch.equal(run_int8(x, parts, 0, "int8"), want), isa_name
        assert torch.equal(run_int8(x[:1], parts, 0, "int8"), want[:1]), isa_name
    _C.set_cpu_isa(before)


@pytest.mark.parametrize("x_scale", (None, torch.tensor([0.02])), ids=("by_row", "fixed"))
@pytest.mark.parametrize("kind", ("int8", "int4"))
def test_a_row_that_is_not_finite_stays_so_and_zeros_stay_zero(any_isa, kind, x_scale):
    x, parts = torch.randn(5, NUM_IN), weight_of(kind, 32, False)
    x[0, 3], x[1, 5], x[2] = torch.nan, torch.inf, 0
    out = run_int8(x, parts, 32, kind, x_scale)
    assert not out[:2].isfinite().any() and (out[2] == 0).all()
    assert torch.equal(out[3:], run_int8(x[3:], parts, 32, kind, x_scale))
