"""Every Triton kernel of the table against its reference, generated from the registry; edges the registry has not."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter
from declared import without_library
from fp8_cases import CACHED, STORED, fp8_of, numbers_to_round, over_fp8, too_large
from native_fixtures import FLOATS
from ops_cases import assert_agrees, assert_close, assert_lies_as_fake, cases
from triton_interpreter import assert_fits, compile_launches
from triton_ops_cases import BY_NAME, make

from fuseline.compile.kernels.triton import linear, norm, rope
from fuseline.compile.kernels.triton.experts import SORTED, default_tile, experts, tiles
from fuseline.compile.kernels.triton.experts_kernels import sort_kernel
from fuseline.compile.kernels.triton.lines import line_sums
from fuseline.compile.ops import codes
from fuseline.compile.ops import norm as norm_reference
from fuseline.compile.ops.library import Make
from fuseline.compile.ops.moe import experts as experts_reference
from fuseline.compile.ops.registry import registry
from fuseline.compile.ops.rope import FP8

__all__ = ["triton_interpreter"]
KERNELS = without_library()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("label", KERNELS)
def test_kernels_agree_with_their_reference(label, dtype):
    op = registry()[KERNELS[label][0].op]
    for args in cases(op, dtype):
        taking = [kernel for kernel in KERNELS[label] if kernel.supports(*args)]
        assert len(taking) == 1 or dtype == torch.float32 and label == "triton.matmul"
        for kernel in taking:
            assert_agrees(op, args, kernel.run)


@pytest.mark.parametrize("label", KERNELS)
def test_outputs_lie_as_the_fakes_say(label):
    op = registry()[KERNELS[label][0].op]
    for args in cases(op, torch.bfloat16):
        assert_lies_as_fake(op, args, KERNELS[label][0].run)


@pytest.mark.parametrize("dim", (1, 16, 2050))
def test_norms_of_any_size_and_layout(dim):
    """Few features many lines a program and the reverse; transposed and cut views; nothing at all."""
    m, weight = make(), make().normal(dim)
    wide = m.normal(3, 5, 2 * dim + 3)
    for x in (
        wide[..., :dim],
        wide[..., :dim].transpose(0, 1),
        m.normal(2, 3, 4, dim).permute(2, 0, 1, 3),
        wide[:0, :, :dim],
    ):
        assert_close(norm.rms_norm(x, weight, 1e-5, 0), norm_reference.rms_norm(x, weight, 1e-5, 0), 4.0)
        assert_close(norm.layer_norm(x, weight, None, 1e-5), norm_reference.layer_norm(x, weight, None, 1e-5), 8.0)
        other = m.normal(*x.shape)
        pairs = zip(norm.add_rms_norm(x, other, weight, 1e-5, 0),
                    norm_reference.add_rms_norm(x, other, weight, 1e-5, 0), strict=True)  # fmt: skip
        for found, want in pairs:
            assert_close(found, want, 4.0)
    with pytest.raises(ValueError, match="at most"):
        norm.rms_norm(torch.empty(1, 2 * norm.WIDEST), None, 1e-5, 0)


def test_a_row_of_a_norm_does_not_depend_on_the_others():
    x, weight = make().normal(9, 77), make().normal(77)
    whole = norm.rms_norm(x, weight, 1e-5, 0)
    assert torch.equal(norm.rms_norm(x[4:5], weight, 1e-5, 0), whole[4:5])


@triton.jit
def sums_kernel(out, x, SIZE: tl.constexpr):
    row, column = tl.arange(0, 4), tl.arange(0, SIZE)
    tl.store(out + row, line_sums(tl.load(x + row[:, None] * SIZE + column[None, :])))


@pytest.mark.parametrize("size", (1, 2, 64))
def test_numbers_of_a_line_are_added_two_at_a_time(size):
    x, out = make().normal(4, size, scale=1e3), torch.zeros(4)
    sums_kernel[(1,)](out, x, SIZE=size)
    while x.shape[1] > 1:
        x = x[:, ::2] + x[:, 1::2]
    assert torch.equal(out, x[:, 0])


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CACHED)
def test_kernels_over_fp8_caches_agree_with_their_reference(name, dtype, fp8):
    for args in over_fp8(registry()[name], dtype, fp8):
        assert_agrees(registry()[name], args, BY_NAME[name].run)


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_every_number_becomes_the_nearest_byte_of_fp8(fp8):
    x = numbers_to_round(fp8)
    k_cache, v_cache = (torch.zeros(1, 1, 1, len(x), dtype=fp8) for _ in "kv")
    rope.write_cache(k_cache, v_cache, x[None, None, None], -x[None, None, None], torch.tensor([0]))
    for cache, numbers in ((k_cache, x), (v_cache, -x)):
        found, want = cache.flatten().view(torch.uint8), numbers.to(fp8).view(torch.uint8)
        assert torch.equal(found, want), (numbers[found != want], found[found != want], want[found != want])


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_what_is_too_large_for_fp8_becomes_its_largest_number(stored):
    x, scale, want = too_large(stored)
    k_cache, v_cache = (torch.zeros(1, 1, 1, len(x), dtype=stored) for _ in "kv")
    rope.write_cache(k_cache, v_cache, *[x[None, None, None]] * 2, torch.tensor([0]), k_scale=scale, v_scale=scale)
    for cache in (k_cache, v_cache):
        assert torch.equal(cache.view(fp8_of(stored)).float().flatten(), want)


def test_tables_wider_than_what_is_rotated():
    """OLMo2 rotates bf16 by float32 tables and rounds once."""
    for args in registry()["rope"].inputs(make(torch.bfloat16)):
        x, cos, sin, *how = args
        args = x, cos.float(), sin.float(), *how
        assert torch.equal(rope.rope(*args), registry()["rope"].reference(*args).to(torch.bfloat16))


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_rotated_keys_in_fp8_are_the_rotated_keys_rounded(fp8):
    args = list(registry()["rope_cache"].inputs(make(torch.bfloat16)))[0]
    k_cache, v_cache, _, k, v, cos, sin, rows, slots, *how = args
    plain, coded = (k_cache.clone(), v_cache.clone()), [c.to(fp8) for c in (k_cache, v_cache)]
    for caches in (plain, coded):
        rope.rope_cache(*caches, *args[2:])
    for cache, code in zip(plain, coded, strict=True):
        assert torch.equal(cache.to(fp8).view(torch.uint8), code.view(torch.uint8))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k"), [(1, 5, 3), (20, 5, 3), (130, 3, 2), (40, 1, 1), (0, 4, 2)]
)
def test_experts_of_any_number(tokens, num_experts, top_k, dtype):
    """High and low tiles, experts without a token; as the sum in float32 of what the reference says of each choice."""
    m = make(dtype)
    x, first, second = (
        m.normal(tokens, 40),
        m.normal(num_experts, 96, 40, scale=0.2),
        m.normal(num_experts, 40, 48, scale=0.2),
    )
    ids = torch.stack([m.order(num_experts)[:top_k] for _ in range(tokens)]) if tokens else torch.zeros(0, top_k).long()
    weights = m.normal(tokens, top_k).abs()
    args = (first, second, None, None, codes.EXPERT_ACTS["silu"], False, 0.0, 0.0)
    want = torch.zeros(x.shape)
    for k in range(top_k):
        want += experts_reference(x, ids[:, k : k + 1], weights[:, k : k + 1], *args).float()
    found = experts(x, ids, weights, *args)
    assert_close(found, want.to(dtype), 12.0)
    if tokens == 20:
        assert torch.equal(experts(x[:3], ids[:3], weights[:3], *args), found[:3]), "as far as tiles are equally high"


def test_experts_of_many_tiles_and_columns():
    """More tiles than a group and none to spare, several columns of both products."""
    m = make()
    x, first, second = m.normal(330, 80), m.normal(1, 300, 80, scale=0.1), m.normal(1, 80, 150, scale=0.1)
    ids, weights = torch.zeros(330, 1, dtype=torch.int64), m.normal(330, 1).abs()
    args = (x, ids, weights, first, second, None, None, codes.EXPERT_ACTS["silu"], False, 0.0, 0.0)
    assert_close(experts(*args, tile=default_tile(1, 1, 4)), experts_reference(*args), 12.0)


def test_pairs_are_sorted_by_expert_in_several_steps():
    ids = torch.randint(-1, 5, (SORTED + 900, 2), generator=torch.Generator().manual_seed(0))
    order, starts = torch.full((ids.numel(),), -1, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    sort_kernel[(4,)](order, starts, ids, ids.numel(), CHUNK=SORTED)
    want = [(ids.flatten() == expert).nonzero()[:, 0].int() for expert in range(4)]
    assert starts.tolist() == [0, *torch.tensor([len(pairs) for pairs in want]).cumsum(0).tolist()]
    assert torch.equal(order[: starts[4]], torch.cat(want))


def test_choices_outside_the_experts_add_nothing():
    m = make()
    x, first, second = m.normal(3, 24), m.normal(2, 40, 24), m.normal(2, 24, 20)
    args = (first, second, None, None, codes.EXPERT_ACTS["silu"], False, 0.0, 0.0)
    ids, weights = torch.tensor([[0, -1], [2, 1], [-1, 5]]), torch.ones(3, 2)
    found = experts(x, ids, weights, *args)
    kept = experts(x[:2], torch.tensor([[0], [1]]), weights[:2, :1], *args)
    assert torch.equal(found[:2], kept) and not found[2].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "num_out", "num_in"), [(1, 1, 1), (3, 40, 520), (16, 33, 75), (20, 64, 600)])
def test_linear_of_few_rows(rows, num_out, num_in, dtype):
    m = make(dtype)
    x, weight, bias = m.normal(rows, 2 * num_in)[:, ::2], m.normal(num_out, num_in, scale=0.03), m.normal(num_out)
    for b in (None, bias):
        want = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        assert_close(linear.linear(x, weight, b), want.to(dtype), 12.0)
    assert torch.equal(linear.linear(x[:1], weight), linear.linear(x, weight)[:1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("tuning", linear.TUNINGS, ids=str)
def test_no_tuning_of_a_linear_changes_what_is_summed(tuning, dtype):
    """Bit for bit; a GPU's instruction takes k in the same steps at any depth, the interpreter's product does not."""
    m = make(dtype)
    x, weight, bias = m.normal(16, 600), m.normal(2 * 37, 600, scale=0.03), m.normal(74)
    silu = codes.UNARY["silu"]
    for run, args in ((linear.linear, (x, weight, bias)), (linear.linear_act_mul, (x, weight, None, silu))):
        found, plain = run(*args, tuning=tuning), run(*args)
        is_same = torch.cuda.is_available() or tuning.depth == linear.Tuning.of(74, None).depth
        assert torch.equal(found, plain) if is_same else assert_close(found, plain, 12.0) is None


@pytest.mark.parametrize("tile", tiles(2), ids=str)
def test_experts_by_any_tile(tile):
    m = make(torch.bfloat16)
    x, first, second = m.normal(40, 40), m.normal(3, 96, 40, scale=0.2), m.normal(3, 40, 48, scale=0.2)
    ids, weights = torch.stack([m.order(3)[:2] for _ in range(40)]), m.normal(40, 2).abs()
    args = (first, second, None, None, codes.EXPERT_ACTS["silu"], False, 0.0, 0.0)
    found = experts(x, ids, weights, *args, tile=tile)
    assert_close(found, experts(x, ids, weights, *args), 12.0)
    assert torch.equal(experts(x[:3], ids[:3], weights[:3], *args, tile=tile), found[:3])


def launches(arch: int) -> None:
    """Llama 8B's shapes, and those of a mixture of experts as gpt-oss and Mixtral are."""
    bf16 = Make(torch.bfloat16, torch.Generator().manual_seed(0))
    x, weight = bf16.normal(3, 4096), bf16.normal(4096)
    for mode in range(3 if arch == 90 else 1):
        norm.add_rms_norm(x, x, weight, 1e-5, mode)
    norm.rms_norm(x.view(1, 3, 32, 128), weight[:128], 1e-5, 0)
    norm.add_layer_norm(x, x, weight, weight, 1e-5)
    rotary = list(registry()["rope_cache"].inputs(bf16))
    for args in rotary if arch == 90 else rotary[:1]:
        rope.rope_cache(*args)
        for fp8 in FP8:
            rope.rope_cache(*(c.to(fp8) for c in args[:2]), *args[2:], torch.ones(1), torch.ones(1))
            rope.write_cache(*(c.to(fp8) for c in args[:2]), *args[3:5], args[8])
        rope.rope(*args[2:3], *args[5:8], *args[9:])
        rope.write_cache(*args[:2], *args[3:5], args[8])
    for name in ("act_mul", "gather_rows", "route_topk"):
        for args in cases(registry()[name], torch.bfloat16)[: None if arch == 90 else 1]:
            BY_NAME[name].run(*args)
    for tokens, act, transposed in ((1, "silu", False), (300, "glu_oss", True))[: 2 if arch == 90 else 1]:
        tall, wide = torch.empty(8, 2048, 256, dtype=torch.bfloat16), torch.empty(8, 256, 1024, dtype=torch.bfloat16)
        shapes = (wide.transpose(1, 2)[..., :256], wide.transpose(1, 2)) if transposed else (tall, wide)
        x = torch.empty(tokens, 256, dtype=torch.bfloat16)
        ids = torch.zeros(tokens, 2, dtype=torch.int64)
        experts(x, ids, x[:, :2], *shapes, None, None, codes.EXPERT_ACTS[act], transposed, 1.0, 7.0)
    joined = torch.empty(28672, 4096, dtype=torch.bfloat16)
    linear.linear_act_mul(x[:1, :1].expand(1, 4096), joined, None, codes.UNARY["silu"])
    linear.linear(x[:1, :1].expand(1, 4096), joined, None)
    for tuning in linear.TUNINGS if arch == 90 else ():
        linear.linear_act_mul(x[:1, :1].expand(1, 4096), joined, None, codes.UNARY["silu"], tuning=tuning)
    for tile in tiles(2) if arch == 90 else ():
        experts(x[:1], ids[:1], x[:1, :2], tall, tall.view(8, 256, 2048)[..., :1024], *[None] * 2, 0, False, 1.0, 7.0,
                tile=tile)  # fmt: skip


@pytest.mark.slow
def test_every_kernel_compiles():
    entries = compile_launches("test_triton_ops", 80, 90, 100)
    assert {e["kernel"] for e in entries} == {
        "norm_kernel", "act_mul_kernel", "gather_kernel", "rope_kernel", "write_kernel",
        "rope_cache_kernel", "route_kernel", "sort_kernel", "gate_up_kernel", "down_kernel", "combine_kernel",
        "few_rows_kernel",
    }  # fmt: skip
    assert_fits(entries)
