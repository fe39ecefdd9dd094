"""Every CUDA C++ kernel of the table against its reference, by its emulator on the CPU; edges the registry has not."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import cuda_emulator
import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from declared import declared
from fake_gpu import GPU
from fp8_cases import CACHED, STORED, fp8_of, numbers_to_round, over_fp8, too_large
from native_fixtures import FLOATS
from ops_cases import assert_agrees, assert_close, assert_lies_as_fake, cases, copies, outputs

from fuseline.compile.backends.cuda.executable import CudaExecutable
from fuseline.compile.kernels.cuda import activation as cuda_activation
from fuseline.compile.kernels.cuda import library as cuda_library
from fuseline.compile.kernels.cuda import linear as cuda_linear
from fuseline.compile.kernels.cuda import norm as cuda_norm
from fuseline.compile.kernels.cuda import rope as cuda_rope
from fuseline.compile.ops import codes
from fuseline.compile.ops import norm as norm_reference
from fuseline.compile.ops.library import Make
from fuseline.compile.ops.linear import linear_act_mul as linear_act_mul_reference
from fuseline.compile.ops.registry import registry
from fuseline.compile.ops.rope import FP8

__all__ = ["triton_interpreter"]
BY_NAME = declared("cuda")
HALF = (torch.bfloat16, torch.float16)
ALIKE = {"linear", "linear_act_mul", "linear_code_rows", "paged_attention"}
"""Ops of which only half precision is taken."""


def make(dtype=torch.float32) -> Make:
    return Make(dtype, torch.Generator().manual_seed(3))


def taken(name: str, dtype: torch.dtype) -> list[tuple]:
    return [args for args in cases(registry()[name], dtype) if BY_NAME[name].supports(*args)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", BY_NAME)
def test_kernels_agree_with_their_reference(name, dtype):
    op, found_cases = registry()[name], taken(name, dtype)
    assert bool(found_cases) == (dtype in HALF or name not in ALIKE)
    for args in found_cases:
        assert_agrees(op, args, by_emulator(name))


@pytest.mark.parametrize("name", BY_NAME)
def test_outputs_lie_as_the_fakes_say(name):
    for args in taken(name, torch.bfloat16):
        assert_lies_as_fake(registry()[name], args, by_emulator(name))


def by_emulator(name: str) -> Callable:
    return partial(cuda_emulator.run, BY_NAME[name].run)


PRODUCTS = [(1, 8), (33, 40), (100, 520), (2050, 1032), (4104, 264)]
"""(N, K): one block and many, narrow and wide tiles, whole and cut, K of less than a load and of several turns."""


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("num_out", "num_in"), PRODUCTS)
def test_linear(num_out, num_in, dtype):
    m = make(dtype)
    weight, bias = m.normal(num_out, num_in, scale=0.05), m.normal(num_out)
    for rows in (1, 7, 16):
        x = m.normal(rows, 2 * num_in)[:, num_in:]
        for b in (None, bias):
            want = F.linear(x.double(), weight.double(), None if b is None else b.double())
            assert_close(cuda_emulator.run(cuda_linear.linear, x, weight, b), want.to(dtype), 12.0)


@pytest.mark.parametrize("act", (1, 2, 3, 4))
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 8), (37, 520), (2052, 264)])
def test_linear_act_mul(num_out, num_in, act):
    m = make(torch.bfloat16)
    weight, bias = m.normal(2 * num_out, num_in, scale=0.05), m.normal(2 * num_out)
    for rows in (1, 9):
        x = m.normal(rows, num_in)
        for b in (None, bias):
            found = cuda_emulator.run(cuda_linear.linear_act_mul, x, weight, b, act)
            want = linear_act_mul_reference(x.float(), weight.float(), None if b is None else b.float(), act)
            # The two products are rounded before they are multiplied.
            torch.testing.assert_close(found.float(), want, rtol=0.02, atol=0.02)


def test_a_row_of_a_product_does_not_depend_on_the_others():
    m = make(torch.bfloat16)
    for num_out in (24, 2056, 4096):
        x, weight = m.normal(16, 1288), m.normal(num_out, 1288)
        whole = cuda_emulator.run(cuda_linear.linear, x, weight)
        gated = cuda_emulator.run(cuda_linear.linear_act_mul, x, weight, None, 1)
        for rows in (slice(0, 1), slice(3, 5), slice(11, 16)):
            assert torch.equal(cuda_emulator.run(cuda_linear.linear, x[rows], weight), whole[rows])
            assert torch.equal(cuda_emulator.run(cuda_linear.linear_act_mul, x[rows], weight, None, 1), gated[rows])


def test_products_that_are_not_taken_are_torchs():
    m = make(torch.bfloat16)
    weight = m.normal(24, 64)
    for x in (m.normal(17, 64), m.normal(3, 65)[:, 1:], m.normal(0, 64), m.normal(2, 128)[:, ::2]):
        assert_close(cuda_emulator.run(cuda_linear.linear, x, weight), F.linear(x, weight), 12.0)
        assert_close(
            cuda_emulator.run(cuda_linear.linear_act_mul, x, weight, None, 1),
            linear_act_mul_reference(x, weight, None, 1), 12.0,
        )  # fmt: skip
    supports = BY_NAME["linear"].supports
    x = m.normal(1, 64)
    assert supports(x, weight) and supports(x, weight, weight[:, 0].contiguous())
    for other in (weight.float(), weight.T, weight[:, :60], m.normal(24, 68)[:, :64]):
        assert not supports(x, other)
    assert not supports(x, weight, torch.zeros(24)) and not supports(x.float(), weight.float())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("dim", (1, 24, 1032, 2050, 6000, 9000, 20000))
def test_norms_of_any_size_and_layout(dim, dtype):
    """A warp or a block a line, more than it holds, vectors and single numbers; transposed and cut views; nothing."""
    m = make(dtype)
    weight, bias, wide = m.normal(dim), m.normal(dim), m.normal(3, 5, 2 * dim + 8)
    for x in (
        wide[..., :dim],
        wide[..., 1 : dim + 1].transpose(0, 1),
        m.normal(2, 3, 1, dim).permute(2, 0, 1, 3),
        wide[:0, :, :dim],
    ):
        other = m.normal(*x.shape)
        rms, layer = (weight, 1e-5, codes.NORM_ONE_PLUS), (weight, bias, 1e-5)
        for kernel, reference, args in (
            (cuda_norm.rms_norm, norm_reference.rms_norm, (x, *rms)),
            (cuda_norm.add_rms_norm, norm_reference.add_rms_norm, (x, other, *rms)),
            (cuda_norm.layer_norm, norm_reference.layer_norm, (x, *layer)),
            (cuda_norm.add_layer_norm, norm_reference.add_layer_norm, (x, other, *layer)),
        ):
            for found, want in zip(outputs(cuda_emulator.run(kernel, *args)), outputs(reference(*args)), strict=True):
                assert_close(found, want, 16.0)


def test_a_row_of_a_norm_does_not_depend_on_the_others():
    for dim in (64, 4096):
        x, weight = make().normal(9, dim), make().normal(dim)
        whole = cuda_emulator.run(cuda_norm.rms_norm, x, weight, 1e-5, 0)
        assert torch.equal(cuda_emulator.run(cuda_norm.rms_norm, x[4:5], weight, 1e-5, 0), whole[4:5])


def test_gated_activations_of_any_layout():
    m = make(torch.bfloat16)
    joined, turned = m.normal(1, 5, 2 * 48), m.normal(4, 3, 2 * 40).transpose(0, 1)
    for gate, up in (
        (joined[..., :48], joined[..., 48:]),
        (joined[..., 1:40], joined[..., 50:89]),
        turned.chunk(2, -1),
    ):
        found = cuda_emulator.run(cuda_activation.act_mul, gate, up, codes.UNARY["silu"])
        assert_close(found, F.silu(gate) * up, 1.0)


@pytest.mark.parametrize("dim", (64, 80))
def test_rope_of_whole_heads(dim):
    """Vectors of pairs, of a joined product's heads, by tables of whole and half lines and of float32."""
    m = make(torch.bfloat16)
    joined = m.normal(1, 5, 6 * dim).unflatten(-1, (6, dim)).transpose(1, 2)
    angles = m.normal(40, dim // 2).float()
    for rotary_dim, table in ((dim, angles), (dim, torch.cat((angles, angles), -1)), (dim // 2, angles[:, : dim // 4])):
        for dtype in (torch.bfloat16, torch.float32):
            args = (table.cos().to(dtype), table.sin().to(dtype), m.ids(40, 5), rotary_dim, codes.ROPE_HALF)
            want = registry()["rope"].reference(joined[:, :4], *args).to(torch.bfloat16)
            assert torch.equal(cuda_emulator.run(cuda_rope.rope, joined[:, :4], *args), want)
            caches = [torch.zeros(3, 1, 16, dim, dtype=torch.bfloat16) for _ in range(4)]
            q, k, v, slots = joined[:, :4], joined[:, 4:5], joined[:, 5:], torch.tensor([0, 47, -1, 16, 5])
            found = cuda_emulator.run(cuda_rope.rope_cache, *caches[:2], q, k, v, *args[:3], slots, *args[3:])
            rotated = registry()["rope"].reference(k, *args).to(torch.bfloat16)
            registry()["write_cache"].reference(*caches[2:], rotated, v, slots)
            assert torch.equal(found, want)
            assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_every_number_becomes_the_nearest_byte_of_fp8(fp8):
    x = numbers_to_round(fp8)
    caches = [torch.zeros(1, 1, 1, len(x), dtype=fp8) for _ in "kv"]
    cuda_emulator.run(cuda_rope.write_cache, *caches, x[None, None, None], -x[None, None, None], torch.tensor([0]))
    for cache, numbers in zip(caches, (x, -x), strict=True):
        assert torch.equal(cache.flatten().view(torch.uint8), numbers.to(fp8).view(torch.uint8))


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_what_is_too_large_for_fp8_becomes_its_largest_number(stored):
    x, scale, want = too_large(stored)
    caches = [torch.zeros(1, 1, 1, len(x), dtype=stored) for _ in "kv"]
    new = x[None, None, None]
    cuda_emulator.run(cuda_rope.write_cache, *caches, new, new, torch.tensor([0]), k_scale=scale, v_scale=scale)
    for cache in caches:
        assert torch.equal(cache.view(fp8_of(stored)).float().flatten(), want)


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_rotated_keys_in_fp8_are_the_rotated_keys_rounded(fp8):
    for args in taken("rope_cache", torch.bfloat16):
        plain, coded = copies(args)[:2], [c.to(fp8) for c in args[:2]]
        for caches in (plain, coded):
            cuda_emulator.run(cuda_rope.rope_cache, *caches, *args[2:])
        for cache, code in zip(plain, coded, strict=True):
            assert torch.equal(cache.to(fp8).view(torch.uint8), code.view(torch.uint8))


def test_a_call_of_other_fields_or_types_is_refused():
    """By the name of the field; the fields are those of csrc/cuda/kernels.def."""
    lib, x = cuda_emulator.emulator(), torch.zeros(8)
    fields = {"out": x, "gate": x, "up": x, "num_lines": 1, "dim": 8, "out_stride": 8, "gate_stride": 8, "up_stride": 8,
              "act": 1, "dtype": 0}  # fmt: skip
    lib.call("act_mul", x, **fields)
    for changed, words in (
        ({"dim": ...}, "field dim is missing"), ({"width": 8}, "there is no field width"),
        ({"dim": ..., "width": 8}, "field dim is missing, there is no field width"),
        ({"dim": 8.5}, "required argument is not an integer"),
    ):  # fmt: skip
        given = {name: value for name, value in (fields | changed).items() if value is not ...}
        with pytest.raises(TypeError, match=f"^cuda.act_mul: {words}"):
            lib.call("act_mul", x, **given)
    with pytest.raises(RuntimeError, match="cuda.act_mul: "):
        lib.call("act_mul", x, **fields | {"dtype": 99})


def test_python_names_the_fields_of_every_kernel():
    """The library's description of itself agrees with the list of kernels."""
    text = re.sub(r"//[^\n]*", "", (cuda_emulator.CSRC / "cuda" / "kernels.def").read_text())
    for kernel in text.split("FL_KERNEL(")[1:]:
        name, fields = kernel.partition(",")[0], re.findall(r"FL_\w+\((\w+)\)", kernel)
        with pytest.raises(TypeError) as error:
            cuda_emulator.emulator().call(name, torch.zeros(1))
        assert re.findall(r"field (\w+) is missing", str(error.value)) == sorted(fields)


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", sorted(set(CACHED) & set(BY_NAME)))
def test_kernels_over_fp8_caches_agree_with_their_reference(name, dtype, fp8):
    """Scales come as a graph has them, behind the op's other arguments."""
    found = [args for args in over_fp8(registry()[name], dtype, fp8) if BY_NAME[name].supports(*args)]
    assert bool(found) == (dtype in HALF or name not in ALIKE)
    for args in found:
        assert_agrees(registry()[name], args, by_emulator(name))


@pytest.mark.parametrize("name", sorted(set(CACHED) & set(BY_NAME)))
def test_caches_of_two_dtypes_are_not_taken(name):
    for e4m3, e5m2 in zip(*(over_fp8(registry()[name], torch.bfloat16, fp8) for fp8 in FP8), strict=True):
        at = 1 + (name == "paged_attention")
        assert not BY_NAME[name].supports(*e4m3[:at], *e5m2[at:])


def test_a_graph_calls_a_kernel_that_no_other_can_stand_in_for(monkeypatch):
    """Lines longer than Triton's kernel takes."""
    monkeypatch.setattr(cuda_library, "library_for", lambda target: cuda_emulator.emulator())
    graph, x = torch.fx.Graph(), torch.randn(1, 2, 40_000)
    node = graph.placeholder("x")
    node.meta["val"] = x.to("meta")
    norm = graph.call_function(torch.ops.fuseline.rms_norm.default, (node, None, 1e-6, 0))
    norm.meta["val"] = x.to("meta")
    graph.output(norm)
    executable = CudaExecutable(torch.fx.GraphModule({}, graph), {}, GPU)
    assert [kernel.label for kernel in executable.kernels.values()] == ["cuda.rms_norm"]
    assert_close(executable.run({"x": x}), registry()["rms_norm"].reference(x, None, 1e-6, 0), 2.0)
