"""Compiled regions: none is used that differs from torch or is slower; one that kills its compiler costs no other."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from zoo import checkpoint

from fuseline.compile.backends.cpu_plan.steps import step_kinds
from fuseline.compile.backends.inductor import check as region_check
from fuseline.compile.backends.inductor import regions as inductor
from fuseline.compile.backends.inductor import upgrade
from fuseline.compile.backends.inductor import worker as region_worker
from fuseline.compile.backends.inductor.check import STEPS, find_fault, is_close, make_tensor
from fuseline.compile.backends.inductor.library import seal
from fuseline.compile.backends.inductor.regions import compile_regions, region_name
from fuseline.compile.backends.inductor.upgrade import _jobs
from fuseline.compile.backends.inductor.worker import rebuild
from fuseline.compile.compiler import optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.graph_pass import PassContext
from fuseline.compile.passes.cut_regions import cut_regions

WIDTH = 64


def described(dtype: str) -> list[dict]:
    """x[T, D], scale[D] seen as [T, D], mask[T, D]; the output y[T, D]."""
    rows = {"sizes": [[0, 1, 0], WIDTH], "strides": [WIDTH, 1]}
    return [
        {"dtype": dtype, **rows}, {"dtype": dtype, **rows, "strides": [0, 1]}, {"dtype": "bool", **rows},
        {"dtype": dtype, **rows},
    ]  # fmt: skip


def eager(args: Sequence[Tensor]) -> None:
    x, scale, mask, y = args
    # As the plan runs it: an op after the other, each with Python around it.
    for _ in range(20):
        y.copy_((x * scale).masked_fill(mask, 0.0).relu())


def same(args: Sequence[Tensor]) -> None:
    x, scale, mask, y = args
    y.copy_((x * scale).masked_fill(mask, 0.0).relu())


def wrong_sign(args: Sequence[Tensor]) -> None:
    same((-args[0], *args[1:]))


def wrong_at_one_place(args: Sequence[Tensor]) -> None:
    same(args)
    args[3][-1, -1] += 0.25


def wrong_for_prompts(args: Sequence[Tensor]) -> None:
    same(args)
    if len(args[0]) > 16:
        args[3][17:].zero_()


def writes_nothing(args: Sequence[Tensor]) -> None:
    pass


def reads_what_it_writes(args: Sequence[Tensor]) -> None:
    args[3].add_(args[0])


WRONG = [(wrong_sign, 1), (wrong_at_one_place, 1), (wrong_for_prompts, 256), (writes_nothing, 1),
         (reads_what_it_writes, 1)]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kernel", "tokens"), WRONG)
def test_a_kernel_that_differs_from_torch_is_refused(kernel: Callable, tokens: int, dtype: str) -> None:
    words = f"output 0 is not what torch computes ({tokens} tokens)"
    assert find_fault(kernel, eager, described(dtype), 1) == words


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_kernel_that_is_right_and_faster_is_used(dtype: str, monkeypatch) -> None:
    monkeypatch.setattr(region_check, "TIMING_SECONDS", 0.02)
    assert find_fault(same, eager, described(dtype), 1) == ""


def test_a_kernel_that_is_slower_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(region_check, "TIMING_SECONDS", 0.02)

    def sleepy(args: Sequence[Tensor]) -> None:
        same(args)
        time.sleep(0.001)

    assert find_fault(sleepy, same, described("float32"), 1).startswith("slower than torch: it takes ")


def test_threads_of_torch_are_put_back() -> None:
    before, seen = torch.get_num_threads(), []

    def spy(args: Sequence[Tensor]) -> None:
        seen.append(torch.get_num_threads())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        find_fault(spy, spy, described("float32"), 1, num_threads=before + 1)
    assert seen == [before + 1] and torch.get_num_threads() == before


@pytest.mark.parametrize("symbols", STEPS)
def test_inputs_have_the_sizes_and_strides_of_the_plan(symbols: tuple[int, ...]) -> None:
    made = [make_tensor(one, symbols, torch.Generator().manual_seed(0)) for one in described("bfloat16")]
    assert [tuple(x.shape) for x in made] == [(symbols[0], WIDTH)] * 4
    assert made[1].stride() == (0, 1) and made[0].dtype == torch.bfloat16 and made[2].dtype == torch.bool
    assert made[0].float().std() > 0.5 and 0 < made[2].float().mean() < 1


def test_how_far_a_region_may_be_from_torch() -> None:
    one = torch.tensor([1.0, 100.0])
    assert is_close(one * (1 + 5e-7), one) and not is_close(one * (1 + 1e-4), one)
    half = one.bfloat16()
    assert is_close(torch.nextafter(half, half * 2), half) and not is_close(half * 1.05, half)
    holes = torch.tensor([float("nan"), float("inf"), 1.0])
    assert is_close(holes.clone(), holes) and not is_close(torch.tensor([1.0, float("inf"), 1.0]), holes)
    assert not is_close(torch.tensor([1, 2]), torch.tensor([1, 3]))


# the worker's process

FAKE_WORKER = """
import json, os, sys
order = json.loads(sys.stdin.readline())
print(file=open({log!r}, "a"), *[name for name, _ in order["jobs"]])
for name, text in order["jobs"]:
    print(json.dumps({{"begins": name}}), flush=True)
    if text == "dies":
        os.abort()
    error, fault = ("", "slower than torch") if text == "slow" else ("no compiler", "")
    print(json.dumps({{"name": name, "seconds": 0.1, "error": error, "fault": fault}}), flush=True)
"""


@pytest.fixture
def fake_worker(tmp_path: Path, monkeypatch) -> Path:
    """A worker that does what the texts say; the file tells the jobs of each of its runs."""
    log = tmp_path / "runs"
    monkeypatch.setattr(inductor, "WORKER", (sys.executable, "-c", FAKE_WORKER.format(log=str(log))))
    return log


def test_a_region_that_kills_its_compiler_costs_no_other(fake_worker: Path, tmp_path: Path, caplog) -> None:
    texts = {"a": "fails", "b": "dies", "c": "slow", "d": "fails"}
    with caplog.at_level(logging.WARNING):
        assert compile_regions(texts, tmp_path / "regions", threading.Event()) == {}
    assert fake_worker.read_text().splitlines() == ["a b c d", "c d"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "4 of 4 regions stay with eager torch: no compiler"


def test_a_compiler_that_always_dies_is_asked_once_for_each(fake_worker: Path, tmp_path: Path, caplog) -> None:
    assert compile_regions({"a": "dies", "b": "dies"}, tmp_path / "regions", threading.Event()) == {}
    assert fake_worker.read_text().splitlines() == ["a b", "b"]
    assert "the compiler ended without an answer (status -6)" in caplog.text


def test_a_refused_region_is_compiled_and_reported_once(fake_worker: Path, tmp_path: Path, caplog) -> None:
    folder = tmp_path / "regions"
    folder.mkdir()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            compile_regions({"a": "slow"}, folder, threading.Event())
    assert fake_worker.read_text().splitlines() == ["a"]
    assert [r.getMessage() for r in caplog.records] == ["1 of 1 regions stay with eager torch: slower than torch"]
    compile_regions({"a": "slow"}, folder, threading.Event(), num_threads=2)  # another question
    (folder / "a-1.no").write_text("damaged")
    compile_regions({"a": "slow"}, folder, threading.Event())
    assert fake_worker.read_text().splitlines() == ["a", "a", "a"]


WRONG_WORKER = """
from torch import fx
from fuseline.compile.backends.inductor import worker as region_worker
original = region_worker.make_library

def make_library(graph, examples, path):
    '''The library of another region: differences for sums.'''
    import torch
    changed = fx.Graph()
    changed.output(changed.graph_copy(graph.graph, {}))
    for node in changed.nodes:
        if node.target is torch.ops.aten.add.Tensor:
            node.target = torch.ops.aten.sub.Tensor
    return original(fx.GraphModule(graph, changed), examples, path)

region_worker.make_library = make_library
region_worker.main()
"""


@pytest.mark.parametrize(("family", "off"), [("cohere", ("find_norm",)), ("deepseek_v3", ("find_moe",))])
def test_decode_steps_have_the_regions_of_all_steps(
    family: str, off: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were one cut otherwise there, either could be compiled without the other: other bits for the same row."""
    asked: list[set[str]] = []
    monkeypatch.setattr(upgrade, "compile_regions", lambda texts, *rest: asked.append(set(texts)) or {})
    for level in (2, 3):
        config = CompileConfig(model=str(checkpoint(family, "bfloat16")), level=level, disabled_passes=off)
        upgrade.RegionUpgrade(optimize(config)[0].graph, {}, config).run()
    assert asked[0] and asked[0] == asked[1]


def texts_of(family: str, dtype: str) -> dict[str, str]:
    config = CompileConfig(model=str(checkpoint(family, dtype)), level=2, disabled_passes=("find_norm",))
    kind = step_kinds(optimize(config)[0].graph, config)[0]
    num_regions = cut_regions(kind.graph, PassContext(config, None, 0, 0)).matches
    jobs = _jobs(kind.lower(set(range(num_regions))))
    return {region_name(job.text): job.text for job in jobs.values()}


@pytest.mark.slow
def test_a_wrong_library_is_never_adopted(tmp_path: Path, monkeypatch, caplog) -> None:
    name, text = next(item for item in texts_of("cohere", "float32").items() if "aten.add.Tensor" in item[1])
    folder = tmp_path / "regions"
    folder.mkdir(mode=0o700)
    with monkeypatch.context() as patch:
        patch.setattr(inductor, "WORKER", (sys.executable, "-P", "-c", WRONG_WORKER))
        assert compile_regions({name: text}, folder, threading.Event()) == {}
    assert "is not what torch computes (1 tokens)" in caplog.text
    assert [path.suffix for path in folder.iterdir()] == [".no"]
    (folder / f"{name}-1.no").unlink()
    kernels = compile_regions({name: text}, folder, threading.Event())
    values, (graph, _) = json.loads(text), rebuild(json.loads(text))
    assert set(kernels) == {name} and [path.suffix for path in folder.iterdir()] == [".so"]
    assert not find_fault(kernels[name], lambda args: graph(*args), values["inputs"], values["num_outputs"])


# caches that do not work


def full_disk(handle: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_costs_the_region_only(tmp_path: Path, monkeypatch) -> None:
    """The worker says why; nothing half-written stays."""

    def compiles(text: str, path: Path, num_threads: int) -> str:
        seal(path, b"library")
        return ""

    monkeypatch.setattr(region_worker, "compile_region", compiles)
    monkeypatch.setattr("fuseline.compile.cache.files.os.fsync", full_disk)
    told = region_worker.answer("a", "{}", tmp_path, 1)
    assert (told["name"], told["fault"]) == ("a", "") and "No space left on device" in told["error"]
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_that_cannot_be_kept_is_done_without(fake_worker: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("fuseline.compile.cache.files.os.fsync", full_disk)
    folder = tmp_path / "regions"
    with caplog.at_level(logging.WARNING):
        assert compile_regions({"a": "slow"}, folder, threading.Event()) == {}
    assert [r.getMessage() for r in caplog.records] == ["1 of 1 regions stay with eager torch: slower than torch"]
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_reported_once_and_another_taken(tmp_path: Path, caplog) -> None:
    (tmp_path / "regions").write_text("a file where the folder should be")
    folder = inductor.region_folder(str(tmp_path))
    assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0 and folder.parent != tmp_path
    assert ["are not cached in" in record.getMessage() for record in caplog.records] == [True]
    folder.rmdir()


def test_a_damaged_library_is_reported_once_and_compiled_anew(fake_worker: Path, tmp_path: Path, caplog) -> None:
    folder = tmp_path / "regions"
    folder.mkdir(mode=0o700)
    seal(folder / "a.so", b"library")
    with (folder / "a.so").open("r+b") as file:
        file.write(b"X")
    with caplog.at_level(logging.WARNING):
        compile_regions({"a": "slow"}, folder, threading.Event())
    assert fake_worker.read_text().splitlines() == ["a"]
    assert ["is damaged" in record.getMessage() for record in caplog.records].count(True) == 1
