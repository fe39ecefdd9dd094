"""The persistent kernel: calls of the library that are recorded and launched as one, by the emulator on the CPU."""

from __future__ import annotations

import ctypes
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cuda_emulator
import pytest
import torch
from fp8_cases import over_fp8
from ops_cases import assert_agrees, cases
from torch import Tensor

from fuseline.compile.kernels.cuda import linear as cuda_linear
from fuseline.compile.kernels.cuda import norm as cuda_norm
from fuseline.compile.kernels.cuda import persistent
from fuseline.compile.kernels.cuda import rope as cuda_rope
from fuseline.compile.kernels.cuda.library import BULK_ISAS, CudaLibrary
from fuseline.compile.kernels.cuda.linear import FEW_ROWS
from fuseline.compile.kernels.cuda.persistent import Recorder, recording_steps
from fuseline.compile.kernels.registry import Implementation, implementations
from fuseline.compile.ops import codes
from fuseline.compile.ops.library import Make
from fuseline.compile.ops.registry import registry
from fuseline.compile.ops.rope import FP8

pytestmark = pytest.mark.skipif(cuda_emulator.ISA not in BULK_ISAS, reason="runs on a GPU that the kernel is not for")
HALF = (torch.bfloat16, torch.float16)
STEPS = {one.op: one for each in implementations("cuda").values() for one in each if one.is_step}


def make(dtype: torch.dtype = torch.bfloat16) -> Make:
    return Make(dtype, torch.Generator().manual_seed(7))


@pytest.fixture
def called(monkeypatch) -> Counter[str]:
    """Calls of the library by name."""
    found: Counter[str] = Counter()
    call = CudaLibrary.call

    def note(self: CudaLibrary, name: str, on: Tensor, **fields: object) -> None:
        found[name] += 1
        call(self, name, on, **fields)

    monkeypatch.setattr(CudaLibrary, "call", note)
    return found


def between_products(lib: CudaLibrary, one: Callable, x: Tensor, weight: Tensor, *args: object) -> tuple:
    """(product before, results of the op, product behind), the op a step of a launch."""
    with recording_steps(lib) as recorder:
        before = cuda_linear.linear(recorder, x, weight)
        found = one(recorder, *args)
        after = cuda_linear.linear(recorder, x, weight)
    return before, found, after


def as_step(one: Implementation, dtype: torch.dtype) -> Callable:
    m = make(dtype)
    x, weight = m.normal(3, 72), m.normal(136, 72)

    def run(*args: object) -> object:
        before, found, after = cuda_emulator.run(between_products, one.run, x, weight, *args)
        assert torch.equal(before, after) and torch.equal(before, cuda_emulator.run(cuda_linear.linear, x, weight))
        return found

    return run


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_steps_agree_with_the_reference_of_their_op(name, dtype, called):
    one = STEPS[name]
    op = registry()[name]
    found = [args for args in cases(op, dtype) if one.supports(*args)]
    for args in found:
        if op.is_product:  # of more rows it is torch's
            args = (args[0].flatten(0, -2)[:FEW_ROWS], *args[1:])
        assert_agrees(op, args, as_step(one, dtype))
    assert found and called["persistent"] >= len(found)


def layer(
    lib: CudaLibrary | Recorder, x: Tensor, residual: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor,
    slots: Tensor, attended: Tensor, gate_up: Tensor, down: Tensor, qkv: Tensor, bias: Tensor, norm: Tensor,
    cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """From attention's results [1, T, 128] to the rotated queries of the next layer, and the residual's sum."""
    x = cuda_linear.linear(lib, x, attended)
    x, residual = cuda_norm.add_rms_norm(lib, x, residual, norm, 1e-5, codes.NORM_CAST_THEN_SCALE)
    x = cuda_linear.linear_act_mul(lib, x, gate_up, None, codes.UNARY["silu"])
    x = cuda_linear.linear(lib, x, down)
    x, residual = cuda_norm.add_rms_norm(lib, x, residual, norm, 1e-5, codes.NORM_CAST_THEN_SCALE)
    x = cuda_linear.linear(lib, x, qkv, bias)
    q, k, v = x.view(1, x.shape[1], 8, 32).transpose(1, 2).split((4, 2, 2), 1)
    return cuda_rope.rope_cache(lib, k_cache, v_cache, q, k, v, cos, sin, rows, slots, 32, codes.ROPE_HALF), residual


def recorded(function: Callable, lib: CudaLibrary, *args: Tensor, ahead: Tensor | None = None) -> object:
    with recording_steps(lib, () if ahead is None else (ahead,)) as recorder:
        return function(recorder, *args)


@dataclass(frozen=True)
class Case:
    """A layer's weights, and the inputs of 16 tokens."""

    hidden: int
    inner: int

    def weights(self) -> tuple[Tensor, ...]:
        m = make()
        shapes = (self.hidden, 128), (2 * self.inner, self.hidden), (self.hidden, self.inner), (256, self.hidden)
        return (*(m.normal(*shape, scale=0.1) for shape in shapes), m.normal(256), m.normal(self.hidden),
                m.normal(40, 32), m.normal(40, 32))  # fmt: skip

    def run(self, rows: slice, is_recorded: bool = True) -> list[Tensor]:
        """(rotated queries, sum, keys, values) of some of the tokens."""
        m, weights = make(), self.weights()
        x, residual = m.normal(1, 16, 128)[:, rows], m.normal(1, 16, self.hidden)[:, rows]
        caches = [torch.zeros(3, 2, 16, 32, dtype=torch.bfloat16) for _ in "kv"]
        args = (x, residual, *caches, torch.arange(16)[rows], torch.arange(0, 32, 2)[rows], *weights)
        if is_recorded:
            found = cuda_emulator.run(partial(recorded, layer), *args, ahead=weights[0])
        else:
            found = cuda_emulator.run(layer, *args)
        return [*found, *caches]


@pytest.mark.parametrize("case", [Case(96, 168), Case(1032, 40), Case(264, 1608)], ids=str)
def test_a_layer_is_one_launch_with_the_results_of_many(case, called):
    """Tiles of several turns and cut ones, fewer inputs than warps and many; blocks in both orders."""
    for rows in (1, 9):
        called.clear()
        ascending, descending = (case.run(slice(rows)) for _ in range(2))
        assert called == {"persistent": 2}
        for first, second, other in zip(ascending, descending, case.run(slice(rows), False), strict=True):
            assert torch.equal(first, second)
            # Narrow products share their inputs among more warps when they are launched alone.
            torch.testing.assert_close(first, other, rtol=0.02, atol=0.02 * other.abs().max().item())


def test_a_row_of_a_layer_does_not_depend_on_the_others():
    case = Case(264, 520)
    whole = case.run(slice(16))
    for rows in (slice(0, 1), slice(5, 8), slice(7, 16)):
        q, total, *_ = case.run(rows)
        assert torch.equal(q, whole[0][:, :, rows]) and torch.equal(total, whole[1][:, rows])


def both_products(lib: CudaLibrary | Recorder, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return cuda_linear.linear(lib, x, weight), cuda_linear.linear_act_mul(lib, x, weight, None, codes.UNARY["silu"])


def test_wide_products_have_the_bits_of_their_own_kernel():
    m = make()
    args = m.normal(3, 1288), m.normal(4104, 1288)
    found = cuda_emulator.run(partial(recorded, both_products), *args)
    assert all(torch.equal(*pair) for pair in zip(found, cuda_emulator.run(both_products, *args), strict=True))


def with_interruptions(lib: CudaLibrary | Recorder, x: Tensor, weight: Tensor) -> Tensor:
    """An op of torch reads what a product writes, there are more products than steps, and more rows than it takes."""
    y = cuda_linear.linear(lib, cuda_linear.linear(lib, x, weight), weight)
    y = torch.cat((y, y.neg())).flip(0)
    for _ in range(12):
        y = cuda_linear.linear(lib, y, weight)
    return cuda_linear.linear(lib, y.repeat(5, 1), weight)


def test_what_is_no_step_is_launched_in_its_turn(called):
    m = make()
    args = m.normal(2, 128), m.normal(128, 128, scale=0.1)
    found = cuda_emulator.run(partial(recorded, with_interruptions), *args)
    assert called == {"persistent": 3}, "two products, nine and three; the last is torch's"
    want = cuda_emulator.run(with_interruptions, *args)
    torch.testing.assert_close(found, want, rtol=0.02, atol=0.02 * want.abs().max().item())


def test_a_cache_of_fp8_is_written_by_its_own_kernel(called):
    (args, *_) = over_fp8(registry()["rope_cache"], torch.bfloat16, FP8[0])
    assert_agrees(registry()["rope_cache"], args, as_step(STEPS["rope_cache"], torch.bfloat16))
    assert called["rope_cache"] == 1 and called["persistent"] == 0


def test_results_stay_until_they_have_been_computed():
    """Nobody frees what only later steps read before the launch."""
    m = make()
    x, weight = m.normal(2, 128), m.normal(128, 128, scale=0.1)
    recorder = Recorder(cuda_emulator.emulator())
    y = cuda_linear.linear(recorder, x, weight)
    address = y.data_ptr()
    z = cuda_linear.linear(recorder, y, weight)
    del y
    assert address not in {torch.empty(2, 128, dtype=torch.bfloat16).data_ptr() for _ in range(4)}
    recorder.launch()
    torch.testing.assert_close(z, x @ weight.T @ weight.T, rtol=0.05, atol=0.05)


def test_the_library_refuses_a_list_that_it_does_not_understand():
    x = torch.zeros(8, dtype=torch.bfloat16)
    for record in (struct.pack("qq", 9, 0), struct.pack("qq", 0, 8) + bytes(8)):
        program = ctypes.create_string_buffer(record)
        with pytest.raises(RuntimeError, match="cuda.persistent: "):
            cuda_emulator.emulator().call("persistent", x, steps=ctypes.addressof(program), num_steps=1, dtype=1)
    assert persistent.MOST_STEPS == constant("kMostSteps")


def constant(name: str) -> int:
    text = (cuda_emulator.CSRC / "cuda" / "persistent.h").read_text()
    return int(text.split(f"{name} = ")[1].split(";")[0])
