"""`fuseline bench kernels`: workloads of every op, and what is made of their times."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from bench_kernels_cases import small
from native_fixtures import with_threads

from fuseline.api.bench import kernels
from fuseline.api.bench.kernels import Timing
from fuseline.api.cli import main
from fuseline.compile.backends.cpu_plan.single import COPIED_BYTES, SingleCall, single_call, time_call
from fuseline.compile.kernels.registry import PlanCall, implementations
from fuseline.compile.ops.library import Make, ModelShape, moved_bytes
from fuseline.compile.ops.registry import registry
from fuseline.compile.tuning import limits

__all__ = ["small"]

SMALL = ModelShape(64, 96, 4, 2, 16, 130)
NATIVE = [op for name, op in registry().items() if name in implementations("cpu")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", NATIVE, ids=lambda op: op.name)
def test_every_op_with_a_kernel_has_workloads(op, dtype) -> None:
    # Outputs are so small that time_call writes to them, not to copies.
    works = list(op.workloads(Make(dtype, torch.Generator().manual_seed(0), (1, 16, 100)), SMALL))
    assert len({work.label for work in works}) == len(works) > 1
    for work in works:
        call = single_call(op, work.args)
        moved = work.num_bytes or call.num_bytes
        assert 0 < moved <= 4 * call.num_bytes and work.flops >= 0
        assert time_call(call, 2) > 0
        made = call.tensors[: call.num_outputs]
        assert all(out.nbytes < COPIED_BYTES for out in made)
        assert all(not out.is_floating_point() or out.isfinite().all() for out in made)


def test_arithmetic_of_a_product() -> None:
    (work, *_) = registry()["linear_panels"].workloads(Make(torch.bfloat16, torch.Generator()), SMALL)
    assert work.label == "1 x 64 -> 128" and work.flops == 2 * 64 * 128
    assert single_call(registry()["linear_panels"], work.args).num_bytes == 2 * (64 + 64 * 128 + 128)


@pytest.mark.parametrize("op", [op for op in NATIVE if op.workloads], ids=lambda op: op.name)
def test_workloads_are_made_where_and_for_the_steps_that_are_asked_for(op) -> None:
    """Every tensor on the device; 2,000 tokens fit what they are written to."""
    make = Make(torch.bfloat16, torch.Generator().manual_seed(0), (1, 2000), "meta")
    for work in op.workloads(make, SMALL):
        assert all(arg.device.type == "meta" for arg in work.args if isinstance(arg, torch.Tensor))
        assert moved_bytes(op, work) > 0
    if op.name in ("add_rms_norm", "act_mul", "rope_cache", "write_cache"):
        assert [work.label.split(" ")[0] for work in op.workloads(make, SMALL)] == ["1", "2000"]


def test_what_a_work_moves() -> None:
    """Arguments and results once, unless the work says it."""
    ops, make = registry(), Make(torch.bfloat16, torch.Generator(), (3,))
    (norm,), (rope,) = (list(ops[name].workloads(make, SMALL)) for name in ("add_rms_norm", "rope_cache"))
    assert moved_bytes(ops["add_rms_norm"], norm) == 2 * (4 * 3 * 64 + 64)
    assert moved_bytes(ops["rope_cache"], rope) == rope.num_bytes == 2 * 3 * 16 * (2 * 4 + 4 * 2 + 2)


def test_large_tensors_are_read_from_memory(monkeypatch) -> None:
    """Copies in turns; small tensors are shared."""
    pointers = []
    monkeypatch.setattr("fuseline.compile.backends.cpu_plan.single._add_tensor", spy(pointers))
    large, small = torch.ones(300_000), torch.ones(1)
    call = SingleCall(PlanCall("binary_scalar", (None,), (0,), (1.0,)), (large, small), 1)
    with pytest.raises(ValueError):
        time_call(call, 1)
    assert pointers[0][0] != large.data_ptr() and pointers[1][0] == small.data_ptr()


def spy(pointers: list):
    def add(plan, tensor: torch.Tensor) -> int:
        pointers.append((tensor.data_ptr(), tensor.nbytes))
        return 999

    return add


def test_shares_are_of_what_binds(small, capsys) -> None:
    arguments = ["bench", "kernels", "--shapes", "135m", "--ops", "linear_panels,rms_norm", "--repeats", "2", "--json"]
    assert with_threads(1, lambda: main(arguments)) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["dtype"] == "bfloat16" and values["machine"]["bandwidth"] == 1e9
    rows = [Timing(**row) for row in values["kernels"]]
    assert {row.op for row in rows} == {"linear_panels", "rms_norm"} and {row.shape for row in rows} == {"135m"}
    for row in rows:
        times = {"memory": row.num_bytes / 1e9, "arithmetic": row.flops / 1e10}
        assert row.bound == max(times, key=times.get)
        assert row.share == pytest.approx(times[row.bound] / row.seconds)
    assert {row.bound for row in rows if row.label.startswith("256")} == {"memory", "arithmetic"}


def test_the_table(small, capsys, tmp_path) -> None:
    path = tmp_path / "result.json"
    arguments = ["--ops", "rope", "--dtype", "float32", "--repeats", "1", "--save-result", str(path)]
    assert with_threads(1, lambda: main(["bench", "kernels", *arguments])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "avx2, 1 threads: reads 1.0 GB/s, products of float32 10 GFLOP/s"
    assert lines[2].split() == ["op", "shape", "work", "us", "GB/s", "GFLOP/s", "share", "of"]
    assert len(lines) == 3 + 2 * 3 and lines[3].startswith("rope              135m  1 x 4 heads ")
    assert len(json.loads(path.read_text())["kernels"]) == 6


def test_the_machine_is_measured(monkeypatch) -> None:
    small = partial(limits.measure_limits, num_bytes=1 << 20, size=64)
    monkeypatch.setattr(limits, "measure_limits", small)
    before = torch.get_num_threads()
    try:
        machine = with_threads(1, lambda: kernels.measure_machine("float32", 1))
    finally:
        torch.set_num_threads(before)
    assert machine.num_threads == 1 and machine.bandwidth > 1e8 and machine.flops > 1e8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "7b"], "--shapes: there is no '7b' (choose from 0.5b, 135m)"),
        (["--ops", "rope,attention"], "--ops: there is no 'attention' (choose from act_mul, "),
        (["--repeats", "0"], "--repeats must be 1 to 10000"),
        (["--cpu-threads", "-1"], "--cpu-threads must be 0 or more"),
    ],
)
def test_bad_flags_are_refused(arguments: list[str], words: str, capsys) -> None:
    assert main(["bench", "kernels", *arguments]) == 1
    assert words in capsys.readouterr().err
