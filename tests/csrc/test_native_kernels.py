"""The simple CPU kernels against torch: every instruction set of this machine, three dtypes, strided and odd shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from native_fixtures import EXTENDING_ISAS, key_panels

from fuseline import _C
from fuseline.compile.ops.linear import pack

ops = torch.ops.fuseline_cpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 7, 16, 37, 130)
NORM_CASES = [(mode, width) for mode in (0, 1, 2) for width in WIDTHS]
ACTS = {1: F.silu, 2: F.gelu, 3: lambda x: F.gelu(x, approximate="tanh"), 4: F.relu}
UNARY = {
    0: torch.neg, **ACTS, 5: torch.tanh, 6: torch.sigmoid, 7: torch.exp, 8: torch.cos, 9: torch.sin, 12: torch.square,
    15: torch.abs,
}  # fmt: skip
POSITIVE = {10: torch.rsqrt, 11: torch.sqrt, 14: torch.reciprocal, 16: torch.log}


@pytest.fixture(params=[isa for isa in _C.available_isas() if isa not in EXTENDING_ISAS], autouse=True)
def isa(request):
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32).to(dtype)


def strided(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows with a gap after each and leading dimensions swapped."""
    return randn(shape[1], shape[0], *shape[2:-1], shape[-1] + 3, dtype=dtype).transpose(0, 1)[..., : shape[-1]]


def check(actual: torch.Tensor, expected: torch.Tensor, num_ulps: float = 1) -> None:
    """Within one rounding of the dtype; fp32 sums and functions within a few."""
    eps = torch.finfo(actual.dtype).eps
    rtol = eps * (8 if actual.dtype == torch.float32 else num_ulps)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=max(eps * rtol, 1e-6))


def rms_reference(x, weight, mode, eps=1e-6):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if mode == 0:
        return weight * wide.to(x.dtype)
    return (wide * (weight.float() if mode == 1 else 1 + weight.float())).to(x.dtype)


@pytest.mark.parametrize(("mode", "width"), NORM_CASES)
def test_rms_norm(dtype, mode, width):
    x, weight = strided(3, 5, width, dtype=dtype), randn(width, dtype=dtype)
    out = torch.empty(3, 5, width, dtype=dtype)
    ops.rms_norm(out, x, weight, mode, 1e-6)
    check(out, rms_reference(x, weight, mode))


@pytest.mark.parametrize("width", WIDTHS)
def test_add_norms(dtype, width):
    x, residual = strided(3, 5, width, dtype=dtype), randn(3, 5, width, dtype=dtype)
    weight, bias = randn(width, dtype=dtype), randn(width, dtype=dtype)
    out, total = torch.empty_like(residual), torch.empty_like(residual)
    ops.add_rms_norm(out, total, x, residual, weight, 0, 1e-6)
    assert torch.equal(total, x + residual)
    check(out, rms_reference(x + residual, weight, 0))
    ops.add_layer_norm(out, total, x, residual, weight, bias, 1e-5)
    assert torch.equal(total, x + residual)
    single = torch.empty_like(out)
    ops.layer_norm(single, total, weight, bias, 1e-5)
    assert torch.equal(single, out)
    expected = F.layer_norm(total.double(), (width,), weight.double(), bias.double(), 1e-5).to(dtype)
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps * 2, atol=2e-6)


def test_rows_do_not_depend_on_the_batch(dtype):
    x, weight = randn(600, 130, dtype=dtype), randn(130, dtype=dtype)
    whole, alone = torch.empty_like(x), torch.empty(1, 130, dtype=dtype)
    ops.rms_norm(whole, x, weight, 0, 1e-6)
    for row in (0, 63, 599):
        ops.rms_norm(alone, x[row : row + 1], weight, 0, 1e-6)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("code", UNARY)
def test_unary(dtype, code):
    x = strided(3, 5, 41, dtype=dtype) * 3
    out = torch.empty(3, 5, 41, dtype=dtype)
    ops.unary(out, x, code, 0.0, 0.0)
    check(out, UNARY[code](x.float()).to(dtype))


@pytest.mark.parametrize("code", POSITIVE)
def test_unary_of_positive_numbers(dtype, code):
    x = randn(3, 41, dtype=dtype).abs() + 0.1
    out = torch.empty_like(x)
    ops.unary(out, x, code, 0.0, 0.0)
    check(out, POSITIVE[code](x.float()).to(dtype))


def test_clamp_and_softplus(dtype):
    x = randn(3, 41, dtype=dtype) * 10
    out = torch.empty_like(x)
    ops.unary(out, x, 13, -1.0, 2.0)
    assert torch.equal(out, x.clamp(-1, 2))
    ops.unary(out, x, 17, 1.0, 20.0)
    check(out, F.softplus(x.float()).to(dtype))


def test_functions_at_the_ends_of_their_range():
    x = torch.tensor([0.0, -0.0, 88.7, 89.5, -87.0, -103.0, -110.0, torch.inf, -torch.inf, torch.nan, 1e-30, 6.0, -0.5])
    for code in (1, 2, 3, 5, 6, 7):
        out = torch.empty_like(x)
        ops.unary(out, x, code, 0.0, 0.0)
        # Against fp64 (torch's own fp32 gelu of infinity is NaN); subnormal results may be flushed by 1 / (1 + exp(x)).
        torch.testing.assert_close(out, UNARY[code](x.double()).float(), rtol=1e-6, atol=1e-40, equal_nan=True)


BINARY = {
    0: lambda a, b: torch.add(a, b, alpha=0.5), 1: lambda a, b: torch.sub(a, b, alpha=0.5), 2: torch.mul, 3: torch.div,
    4: torch.maximum, 5: torch.minimum, 7: lambda a, b: torch.rsub(a, b, alpha=0.5),
}  # fmt: skip


@pytest.mark.parametrize("code", BINARY)
def test_binary_broadcasts(dtype, code):
    a, b = strided(3, 5, 41, dtype=dtype), randn(5, 1, dtype=dtype)
    out = torch.empty(41, 3, 5, dtype=dtype).permute(1, 2, 0)
    ops.binary(out, a, b, code, 0.5)
    assert torch.equal(out, BINARY[code](a.float(), b.float()).to(dtype))


def test_binary_scalar_and_mixed_dtypes(dtype):
    x = randn(4, 33, dtype=dtype)
    out = torch.empty(4, 33)
    ops.binary_scalar(out, x, 2, 0.25)
    assert torch.equal(out, x.float() * 0.25)
    ops.binary(out, x, out.clone(), 0, 1.0)
    assert torch.equal(out, x.float() * 1.25)
    ops.binary_scalar(out, x.abs(), 6, 3.0)
    check(out, x.float().abs() ** 3)


def test_integers_stay_exact():
    big = torch.tensor([2**40 + 1, -(2**53) - 1, 7])
    out = torch.empty_like(big)
    ops.binary(out, big, torch.tensor([3]), 2, 1.0)
    assert torch.equal(out, big * 3)
    ops.binary_scalar(out, big, 0, 1.0)
    assert torch.equal(out, big + 1)
    small = torch.empty(3, dtype=torch.int32)
    ops.copy(small, torch.tensor([1, -2, 3]))
    assert small.tolist() == [1, -2, 3]


def test_copy_converts_as_torch_does(dtype):
    x = torch.cat([torch.randn(4096) * 10 ** torch.linspace(-9, 6, 4096), torch.tensor([torch.inf, 65519.9, 65520.0])])
    out = torch.empty_like(x, dtype=dtype)
    ops.copy(out, x)
    assert torch.equal(out, x.to(dtype))
    back = torch.empty_like(x)
    ops.copy(back, out)
    assert torch.equal(back, out.float())
    every_other = torch.empty(50, dtype=dtype)
    ops.copy(every_other, out[:100:2])
    assert torch.equal(every_other, out[:100:2])


@pytest.mark.parametrize("act", ACTS)
def test_act_mul(dtype, act):
    both = randn(9, 74, dtype=dtype)
    gate, up = both.split(37, dim=-1)
    out = torch.empty(9, 37, dtype=dtype)
    ops.act_mul(out, gate, up, act)
    check(out, ACTS[act](gate.float()).to(dtype) * up, num_ulps=2)


def test_embedding_panels_and_gather(dtype):
    table, ids = randn(37, 21, dtype=dtype), torch.tensor([[5, 0, 36, 5]])
    panels = pack(table)
    out = torch.empty(1, 4, 21, dtype=dtype)
    ops.embedding(out, ids, table)
    assert torch.equal(out, table[ids])
    ops.embedding_panels(out.zero_(), ids, panels, 37)
    assert torch.equal(out, table[ids])
    ops.gather_rows(out[0].zero_(), table, ids[0].int())
    assert torch.equal(out, table[ids])
    ops.embedding_panels(out, torch.tensor([[37, -1, 99, 0]]), panels, 37)
    assert torch.equal(out[0, :3], torch.zeros(3, 21, dtype=dtype)) and torch.equal(out[0, 3], table[0])


def rope_reference(x, cos, sin, rotary_dim, layout):
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if layout == 0:
        low, high = rotated.chunk(2, -1)
        turned = torch.cat([-high, low], -1)
    else:
        turned = torch.stack([-rotated[..., 1::2], rotated[..., 0::2]], -1).flatten(-2)
    return torch.cat([rotated * cos + turned * sin, rest], -1)


def rope_tables(rotary_dim, layout, dtype, is_half):
    angles = torch.arange(50)[:, None] * 0.1 ** torch.arange(rotary_dim // 2)
    full = torch.cat([angles, angles], -1) if layout == 0 else angles.repeat_interleave(2, -1)
    table = angles if is_half else full
    return (full.cos().to(dtype), full.sin().to(dtype)), (table.cos().to(dtype), table.sin().to(dtype))


@pytest.mark.parametrize("is_half", (False, True))
@pytest.mark.parametrize("layout", (0, 1))
@pytest.mark.parametrize("rotary_dim", (6, 20))
@pytest.mark.parametrize("block", (4, 16, 32))
def test_rope_and_caches(dtype, layout, rotary_dim, is_half, block):
    num_tokens, head_dim, value_dim = 9, 20, 12
    packed = randn(num_tokens, 2 * head_dim * 2, dtype=dtype)
    q = packed[:, : 2 * head_dim].view(1, num_tokens, 2, head_dim).transpose(1, 2)
    k = packed[:, 2 * head_dim :].view(1, num_tokens, 2, head_dim).transpose(1, 2)
    v = randn(1, 2, num_tokens, value_dim, dtype=dtype)
    rows = torch.randint(0, 50, (num_tokens,), generator=torch.Generator().manual_seed(0))
    (cos, sin), tables = rope_tables(rotary_dim, layout, dtype, is_half)
    q_ref, k_ref = (rope_reference(x, cos[rows], sin[rows], rotary_dim, layout) for x in (q, k))
    out = torch.empty_like(q)
    ops.rope(out, q, *tables, rows, rotary_dim, layout)
    assert torch.equal(out, q_ref)

    slots = torch.randperm(6 * block, generator=torch.Generator().manual_seed(0))[:num_tokens]
    slots[3] = -1
    kept = [t for t in range(num_tokens) if t != 3]
    k_ref_cache = torch.zeros(6, 2, block, head_dim, dtype=dtype)
    v_ref_cache = torch.zeros(6, 2, block, value_dim, dtype=dtype)
    k_ref_cache[slots[kept] // block, :, slots[kept] % block] = k_ref[0, :, kept].transpose(0, 1)
    v_ref_cache[slots[kept] // block, :, slots[kept] % block] = v[0, :, kept].transpose(0, 1)
    k_cache, v_cache = torch.zeros_like(k_ref_cache), torch.zeros_like(v_ref_cache)
    ops.rope_cache(out.zero_(), k_cache, v_cache, q, k, v, *tables, rows, slots, rotary_dim, layout)
    k_packed = key_panels(k_ref_cache)
    assert torch.equal(out, q_ref) and torch.equal(k_cache, k_packed) and torch.equal(v_cache, v_ref_cache)
    ops.write_cache(k_cache.zero_(), v_cache.zero_(), k_ref, v, slots)
    assert torch.equal(k_cache, k_packed) and torch.equal(v_cache, v_ref_cache)
