"""The plan replayer, the thread pool, the choice of instruction set, and what their errors say."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from fuseline import _C

ops = torch.ops.fuseline_cpu


@pytest.fixture(autouse=True)
def same_threads():
    before = _C.num_threads()
    yield
    _C.set_num_threads(before)


def doubling_plan():
    """out[2, T] = 2 * x[:, :T] of x[2, 8], through a temporary in the arena."""
    plan = _C.Plan()
    symbol = plan.add_symbol("T")
    x, out = plan.add_slot("x"), plan.add_slot("out")
    view = plan.add_tensor(x, 0, "f32", [2, (1, symbol)], [8, 1])
    temporary = plan.add_tensor(-1, 64, "f32", [2, (1, symbol)], [(1, symbol), 1])
    result = plan.add_tensor(out, 0, "f32", [2, (1, symbol)], [(1, symbol), 1])
    plan.add_call("copy", [temporary, view], [], [], "take")
    plan.add_call("binary", [result, temporary, temporary], [0], [1.0], "double")
    return plan, x, out


def test_sizes_follow_symbols():
    plan, x_slot, out_slot = doubling_plan()
    x, arena = torch.arange(16.0).view(2, 8), torch.zeros(64)
    plan.set_slot(x_slot, x.data_ptr())
    plan.set_arena(arena.data_ptr(), arena.nbytes)
    for size in (3, 8, 8, 1, 0):
        out = torch.full((2, size), -1.0)
        plan.set_slot(out_slot, out.data_ptr())
        plan.run([size])
        assert torch.equal(out, 2 * x[:, :size])


def moved_plan():
    """out[2] = the last two of x[0, :1 + 2 T], through the second half of an arena that the steps share."""
    plan = _C.Plan()
    symbol = plan.add_symbol("T")
    x, out = plan.add_slot("x"), plan.add_slot("out")
    view = plan.add_tensor(x, (-4, 8, symbol), "f32", [2], [1])
    temporary = plan.add_tensor(-1, (64, 4, symbol), "f32", [2], [1])
    result = plan.add_tensor(out, 0, "f32", [2], [1])
    plan.add_call("copy", [temporary, view], [], [])
    plan.add_call("copy", [result, temporary], [], [])
    return plan, x, out


def test_offsets_follow_symbols_and_pointers():
    plan, x_slot, out_slot = moved_plan()
    arena = torch.zeros(64)
    plan.set_arena(arena.data_ptr(), arena.nbytes)
    for size in (3, 8, 8, 1, 2):
        x, out = torch.randn(2, 32), torch.zeros(2)
        plan.set_slot(x_slot, x.data_ptr())
        plan.set_slot(out_slot, out.data_ptr())
        for now in (size, size + 1):
            plan.run([now])
            assert torch.equal(out, x[0, 2 * now - 1 : 2 * now + 1])
            assert torch.equal(arena[16 + now : 18 + now], out)
    assert plan.to_text().splitlines()[0] == "copy(out=f32[2]@arena+4*T+64, x=f32[2]@x+8*T-4)"
    before = arena.clone()
    with pytest.raises(RuntimeError, match=r"the offset of f32\[2\]@x\+8\*T-4 is negative"):
        plan.run([0])
    with pytest.raises(RuntimeError, match="ends at byte 272 of an arena of 256"):
        plan.run([50])
    assert torch.equal(arena, before)


def test_parts_profile_and_text():
    plan, x_slot, out_slot = doubling_plan()
    x, out, arena = torch.ones(2, 8), torch.zeros(2, 2), torch.zeros(64)
    for slot, tensor in ((x_slot, x), (out_slot, out)):
        plan.set_slot(slot, tensor.data_ptr())
    plan.set_arena(arena.data_ptr(), arena.nbytes)
    plan.run([2], 0, 1)
    assert out.sum() == 0
    plan.run([2], 1)
    assert torch.equal(out, torch.full((2, 2), 2.0))
    assert plan.num_calls == 2
    rows = plan.profile([2], 3)
    assert [row[:2] for row in rows] == [("take", "copy"), ("double", "binary")] and all(row[2] > 0 for row in rows)
    first, second = plan.to_text().splitlines()
    assert first == "copy(out=f32[2, T]@arena+64, x=f32[2, T]@x)  # take"
    assert "code=0, alpha=1" in second


def test_errors_when_building():
    plan = _C.Plan()
    symbol = plan.add_symbol("T")
    wide = plan.add_tensor(-1, 0, "f32", [(1, symbol), 4], [4, 1])
    narrow = plan.add_tensor(-1, 0, "f32", [(1, symbol), 3], [3, 1])
    half = plan.add_tensor(-1, 0, "bf16", [(1, symbol), 4], [4, 1])
    cases = [
        ("nothing", [wide], [], [], "unknown op 'nothing'"),
        ("rms_norm", [wide, wide], [0], [1e-6], "3 tensors, 1 int and 1 float, got 2, 1 and 1"),
        ("rms_norm", [wide, narrow, -1], [0], [1e-6], r"argument x of shape \[1\*s0, 3\] should be \*D with D = 4"),
        ("rms_norm", [wide, -1, -1], [0], [1e-6], "argument x is absent"),
        ("rms_norm", [wide, half, -1], [0], [1e-6], "argument x is bf16, should be f32 as out"),
        ("rms_norm", [wide, 99, -1], [0], [1e-6], "no tensor 99"),
    ]
    for op, tensors, ints, floats, message in cases:
        with pytest.raises(ValueError, match=message):
            plan.add_call(op, tensors, ints, floats, "")
    with pytest.raises(ValueError, match="unknown dtype"):
        plan.add_tensor(-1, 0, "f64", [1], [1])
    with pytest.raises(ValueError, match="no symbol 7"):
        plan.add_tensor(-1, 0, "f32", [(1, 7)], [1])
    with pytest.raises(ValueError, match="no symbol 7"):
        plan.add_tensor(-1, (4, 7), "f32", [1], [1])
    with pytest.raises(ValueError, match="negative offset in arena"):
        plan.add_tensor(-1, -4, "f32", [1], [1])
    with pytest.raises(ValueError, match="no slot 3"):
        plan.add_tensor(3, 0, "f32", [1], [1])
    assert plan.num_calls == 0


def test_nothing_runs_outside_its_memory():
    plan, x_slot, out_slot = doubling_plan()
    x, out, arena = torch.ones(2, 8), torch.zeros(2, 8), torch.zeros(24)
    plan.set_slot(x_slot, x.data_ptr())
    plan.set_arena(arena.data_ptr(), arena.nbytes)
    with pytest.raises(RuntimeError, match="no pointer was set for out"):
        plan.run([2])
    plan.set_slot(out_slot, out.data_ptr())
    with pytest.raises(RuntimeError, match="ends at byte 128 of an arena of 96"):
        plan.run([8])
    with pytest.raises(RuntimeError, match="1 symbol needed, got 0"):
        plan.run([])
    plan.run([4])


def test_torch_ops_name_the_wrong_argument():
    x = torch.zeros(2, 4)
    with pytest.raises((RuntimeError, ValueError), match="rms_norm: argument x of shape"):
        ops.rms_norm(x, torch.zeros(2, 5), None, 0, 1e-6)
    with pytest.raises((RuntimeError, ValueError), match="embedding: argument ids is f32, should be i64 or i32"):
        ops.embedding(x, torch.zeros(2), torch.zeros(3, 4))
    assert "rms_norm" in _C.op_names()


def test_panels_must_fit_the_sizes_they_stand_for():
    x, panels, out = torch.zeros(2, 8), torch.zeros(3, 8, 16), torch.zeros(2, 40)
    ops.linear(out, x, panels, None, 40, 0)
    with pytest.raises((RuntimeError, ValueError), match="linear: argument panels .* with /N = 2 as in num_out"):
        ops.linear(torch.zeros(2, 30), x, panels, None, 30, 0)
    with pytest.raises((RuntimeError, ValueError), match="linear: argument out .* with N = 40 as in num_out"):
        ops.linear(torch.zeros(2, 30), x, panels, None, 40, 0)
    with pytest.raises((RuntimeError, ValueError), match="linear: argument panels .* with K = 9 as in x"):
        ops.linear(out, torch.zeros(2, 9), panels, None, 40, 0)
    with pytest.raises((RuntimeError, ValueError), match="pack_panels: argument panels .* with # = 16"):
        ops.pack_panels(torch.zeros(3, 8, 8), torch.zeros(40, 8), 0)
    with pytest.raises((RuntimeError, ValueError), match="embedding_panels: argument panels .* with /V = 2"):
        ops.embedding_panels(torch.zeros(1, 8), torch.zeros(1, dtype=torch.long), panels, 20)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("gate_up", (2, 4, 8, 16)), ("down", (2, 1, 30, 16)), ("gate_up_bias", (2, 20)), ("down_bias", (1, 8))],
)
def test_experts_panels_must_fit_the_layer(name, wrong):
    shapes = {"gate_up": (2, 3, 8, 16), "down": (2, 1, 20, 16), "gate_up_bias": (2, 40), "down_bias": (2, 8)}
    x, ids, weights = torch.zeros(3, 8), torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 1)

    def run(**changed):
        layer = [torch.zeros(shape) for shape in (shapes | changed).values()]
        ops.experts(torch.empty_like(x), x, ids, weights, *layer, 0, 20, 1.0, 1.0)

    run()
    with pytest.raises((RuntimeError, ValueError), match=f"experts: argument {name} of shape"):
        run(**{name: wrong})


@pytest.mark.parametrize("num_threads", (1, 2, 5))
def test_results_do_not_depend_on_threads(num_threads):
    x, weight = torch.randn(700, 96), torch.randn(96)
    _C.set_num_threads(1)
    expected, out = torch.empty_like(x), torch.empty_like(x)
    ops.rms_norm(expected, x, weight, 0, 1e-6)
    _C.set_num_threads(num_threads)
    assert _C.num_threads() == num_threads
    for _ in range(50):
        ops.rms_norm(out.zero_(), x, weight, 0, 1e-6)
        assert torch.equal(out, expected)


def test_pool_serves_callers_at_the_same_time():
    _C.set_num_threads(3)
    x = torch.randn(700, 96)
    expected = x * 2
    outs = [torch.empty_like(x) for _ in range(4)]

    def work(out: torch.Tensor) -> None:
        for _ in range(100):
            ops.binary_scalar(out, x, 2, 2.0)

    threads = [threading.Thread(target=work, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, expected) for out in outs)


def test_forced_instruction_set(tmp_path):
    code = "import torch, fuseline._C as c; print(c.cpu_isa())"

    def run(isa: str) -> subprocess.CompletedProcess:
        env = os.environ | {"FUSELINE_CPU_ISA": isa}
        return subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)

    assert run("baseline").stdout.strip() == "baseline"
    assert "ImportError: FUSELINE_CPU_ISA: unknown instruction set 'sse9'" in run("sse9").stderr
    with pytest.raises(RuntimeError, match="this machine can run: baseline"):
        _C.set_cpu_isa("sse9")
