"""pack_panels and linear against torch, and the independence of a row from its batch."""

from __future__ import annotations

import pytest
import torch
from native_fixtures import FLOATS, any_isa, ops, pack, with_threads

__all__ = ["any_isa"]
ROWS = (1, 2, 3, 5, 13, 14, 15, 29, 230)


def run_linear(x, panels, num_out, bias=None, dtype=None, choices=0) -> torch.Tensor:
    out = torch.full((*x.shape[:-1], num_out), float("nan"), dtype=dtype or x.dtype)
    ops.linear(out, x, panels, bias, num_out, choices)
    return out


def exact(x, weight, bias=None) -> torch.Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def make(rows, num_k, num_out, x_dtype=torch.float32, w_dtype=torch.float32):
    gen = torch.Generator().manual_seed(rows * 7919 + num_k + num_out)
    x = torch.randn(rows, num_k, generator=gen).to(x_dtype)
    weight = (torch.randn(num_out, num_k, generator=gen) / num_k**0.5).to(w_dtype)
    return x, weight, torch.randn(num_out, generator=gen).to(w_dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("to", FLOATS)
def test_pack_is_a_transpose_of_16_rows(any_isa, dtype, to):
    weight = torch.randn(37, 71).to(dtype)
    panels = pack(weight, dtype=to)
    padded = torch.cat([weight, torch.zeros(11, 71, dtype=dtype)])
    plain = padded.reshape(3, 16, 71).transpose(1, 2).to(to)
    if to != torch.bfloat16:
        assert torch.equal(panels, plain)
        return
    pairs = panels[:, :70].reshape(3, 35, 16, 2)
    assert torch.equal(pairs[..., 0], plain[:, 0:70:2]) and torch.equal(pairs[..., 1], plain[:, 1:70:2])
    assert torch.equal(panels[:, 70], plain[:, 70])


def test_parts_packed_in_any_order_and_from_any_strides_join(any_isa):
    weight = torch.randn(50, 40)
    panels = torch.zeros(4, 40, 16)
    ops.pack_panels(panels, weight[37:], 37)
    ops.pack_panels(panels, weight[5:37].T.contiguous().T, 5)
    ops.pack_panels(panels, torch.randn(5, 80).copy_(weight[:5].repeat(1, 2))[:, :40], 0)
    assert torch.equal(panels, pack(weight))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("num_k", "num_out"), [(1, 1), (33, 17), (600, 70), (1100, 300)])
def test_fp32_matches_torch(any_isa, rows, num_k, num_out):
    x, weight, bias = make(rows, num_k, num_out)
    y = run_linear(x, pack(weight), num_out, bias)
    torch.testing.assert_close(y.double(), exact(x, weight, bias), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("rows", (1, 4, 17, 60))
@pytest.mark.parametrize("w_dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("num_k", (530, 544))
def test_dtype_mixes_round_once(any_isa, rows, x_dtype, w_dtype, out_dtype, num_k):
    x, weight, bias = make(rows, num_k, 345, x_dtype, w_dtype)
    y = run_linear(x, pack(weight), 345, bias, out_dtype)
    once = exact(x, weight, bias)
    assert y.dtype == out_dtype
    eps = torch.finfo(out_dtype).eps
    torch.testing.assert_close(y.double(), once, rtol=0.5 * eps + 1e-6, atol=1e-5)
    if out_dtype != torch.float32:
        assert (y != once.to(out_dtype)).float().mean() < 0.01


def test_bias_is_added_before_the_rounding_as_torch_does(any_isa):
    x, weight, bias = make(9, 300, 64, torch.bfloat16, torch.bfloat16)
    bias = bias * 20
    theirs = torch.nn.functional.linear(x, weight, bias)
    assert (run_linear(x, pack(weight), 64, bias) != theirs).sum() <= 2


def test_strided_rows_and_leading_dims(any_isa):
    x = torch.randn(3, 8, 5, 100)[:, 2:7].transpose(1, 2)[..., :90]
    weight = torch.randn(40, 90)
    out = torch.zeros(3, 5, 5, 64)
    ops.linear(out[..., 8:48], x, pack(weight), None, 40, 0)
    assert torch.equal(out[..., 8:48], run_linear(x.contiguous(), pack(weight), 40))
    assert out[..., :8].abs().sum() == 0 and out[..., 48:].abs().sum() == 0


SIZES = [*((dtype, 1090) for dtype in FLOATS), (torch.bfloat16, 1088)]
"""Tiles of bf16 take whole steps of 32 inputs."""


@pytest.mark.parametrize(("dtype", "num_k"), SIZES)
def test_a_row_does_not_depend_on_its_batch_or_on_threads(any_isa, dtype, num_k):
    x, weight, bias = make(300, num_k, 333, dtype, dtype)
    panels = pack(weight)
    whole = run_linear(x, panels, 333, bias, torch.float32)
    assert torch.equal(whole, with_threads(2, lambda: run_linear(x, panels, 333, bias, torch.float32)))
    for begin, end in [(0, 1), (299, 300), (7, 9), (20, 24), (30, 37), (0, 64), (100, 115), (60, 300)]:
        part = with_threads(1 + begin % 2, lambda b=begin, e=end: run_linear(x[b:e], panels, 333, bias, torch.float32))
        assert torch.equal(part, whole[begin:end]), (begin, end)


def test_joined_weights_give_what_each_gives_alone(any_isa):
    a, b = torch.randn(21, 64), torch.randn(30, 64)
    x = torch.randn(6, 64)
    joined = run_linear(x, pack(a, b), 51)
    assert torch.equal(joined[:, :21], run_linear(x, pack(a), 21))
    assert torch.equal(joined[:, 21:], run_linear(x, pack(b), 30))


def every_choice():
    """The same byte for every range of rows: 0, 1, 2, 4 panels of a tile, 0 to 63 pairs of panels of a chunk."""
    for group in range(4):
        for width in (0, 1, 3, 8, 63):
            yield int.from_bytes(bytes([group | width << 2] * 5), "little")


@pytest.mark.parametrize(("dtype", "num_k"), SIZES)
@pytest.mark.parametrize("rows", (1, 4, 12, 40, 90))
def test_how_the_work_is_cut_changes_no_bit(any_isa, rows, dtype, num_k):
    x, weight, bias = make(rows, num_k, 333, dtype, dtype)
    panels = pack(weight)
    plain = run_linear(x, panels, 333, bias, torch.float32)
    for choices in every_choice():
        cut = with_threads(2, lambda c=choices: run_linear(x, panels, 333, bias, torch.float32, c))
        assert torch.equal(cut, plain), hex(choices)


@pytest.mark.parametrize("rows", (1, 15, 17, 33, 600))
@pytest.mark.parametrize(("num_k", "num_out"), [(32, 16), (96, 17), (512, 33), (1120, 250)])
def test_bf16_matches_torch(any_isa, rows, num_k, num_out):
    x, weight, bias = make(rows, num_k, num_out, torch.bfloat16, torch.bfloat16)
    y = run_linear(x, pack(weight), num_out, bias, torch.float32)
    torch.testing.assert_close(y.double(), exact(x, weight, bias), rtol=2e-6, atol=1e-5)


def test_a_row_that_is_not_finite_stays_so_and_changes_no_other(any_isa):
    x, weight, _ = make(40, 64, 48, torch.bfloat16, torch.bfloat16)
    plain = run_linear(x, pack(weight), 48)
    x[3, 5], x[20, 7] = torch.nan, torch.inf
    y = run_linear(x, pack(weight), 48)
    others = [row for row in range(40) if row not in (3, 20)]
    assert y[3].isnan().all() and not y[20].isfinite().any() and torch.equal(y[others], plain[others])


def test_no_rows(any_isa):
    assert run_linear(torch.empty(0, 32), pack(torch.randn(20, 32)), 20).shape == (0, 20)
