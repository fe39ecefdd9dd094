"""tools/gpu_check without a GPU: it says so, and its measurements run small through the interpreter."""

from __future__ import annotations

import copy
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import cuda_emulator
import psutil
import pytest
import torch
from fake_cuda import FakeCuda
from fake_gpu import GPU, FakeGpu, FakeGraphs

from fuseline.compile.config import GraphConfig
from fuseline.compile.kernels.cuda import library as cuda_library
from fuseline.compile.kernels.registry import implementations
from fuseline.compile.tuning.clock import HostClock
from fuseline.compile.tuning.limits import Limits

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "gpu_check"
TRIAL = HostClock(repeats=1, warm_ups=0)
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def tool(monkeypatch):
    """Its modules, imported as it does itself."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    from gpu_check import kernels, llama, serving, table

    return kernels, llama, serving, table


def test_without_a_gpu_it_ends_with_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    cause = "built without CUDA" if torch.version.cuda is None else "no GPU, or no driver for it"
    assert done.stderr.startswith("gpu_check: error: ") and done.stderr.endswith(f"{cause}\n")
    assert done.stderr.count("\n") == 1


def test_an_unknown_stage_is_named() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--only", "tests,paint"], capture_output=True, text=True)
    assert done.returncode == 2 and "there is no stage 'paint'" in done.stderr


def main_of_tool(tmp_path, monkeypatch):
    """The stages, working in a folder of their own."""
    from gpu_check import stages

    monkeypatch.setattr(stages, "WORK", tmp_path)
    return stages


def test_wheels_of_a_folder_are_there_for_every_stage(tool, tmp_path, monkeypatch) -> None:
    """Modules and programs, a newer one before what is installed."""
    from gpu_check import build

    wheels = tmp_path / "given"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "msgspec-99.0-py3-none-any.whl", "w") as wheel:
        info = "msgspec-99.0.dist-info"
        wheel.writestr("msgspec/__init__.py", "def main():\n    print('ninety-nine')\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: msgspec\nVersion: 99.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\nsay99 = msgspec:main\n")
        wheel.writestr(f"{info}/RECORD", "")
    main = main_of_tool(tmp_path, monkeypatch)
    for _ in "again":
        build.install(tmp_path / "wheels", sorted(wheels.glob("*.whl")))
    done = subprocess.run(["say99"], env=main.environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "ninety-nine\n"


def test_a_stage_that_takes_too_long_leaves_nothing_running(tool, tmp_path, monkeypatch) -> None:
    main = main_of_tool(tmp_path, monkeypatch)
    started = tmp_path / "started"
    script = f"sh -c 'echo $$ > {started}; sleep 60'; true"
    monkeypatch.setattr(main, "command", lambda name, args: ["sh", "-c", script])
    assert main.run(main.Stage("models", 9, 0), None, 1) == "not done after 1 s"
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(started.read_text())).status() == psutil.STATUS_ZOMBIE
    monkeypatch.setattr(main, "command", lambda name, args: ["sh", "-c", "exit 3"])
    assert main.run(main.Stage("models", 9, 0), None, 9) == "exit status 3"


def on_a_gpu(main, monkeypatch, stages: tuple, *flags: str) -> None:
    monkeypatch.setattr(main, "STAGES", stages)
    monkeypatch.setattr(main, "why_no_gpu", lambda: "")
    monkeypatch.setattr("gpu_check.table.title", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_check", *flags])


def test_later_stages_have_the_time_they_need(tool, tmp_path, monkeypatch) -> None:
    """What a stage does not use the next ones have; nothing is left of the whole time for nobody."""
    main, limits = main_of_tool(tmp_path, monkeypatch), []
    assert sum(stage.least for stage in main.STAGES) <= 480
    monkeypatch.setattr(main, "run", lambda stage, args, seconds: limits.append((stage.name, seconds)) or "")
    stages = (main.Stage("build", 50, 0), main.Stage("models", 100, 30), main.Stage("tune", 60, 41))
    on_a_gpu(main, monkeypatch, stages, "--seconds", "101", "--out", str(tmp_path / "table.md"))
    assert main.main() == 0
    assert limits == [("build", 29), ("models", 59), ("tune", 60)]


def test_what_a_cut_stage_has_not_done_is_printed(tool, tmp_path, monkeypatch, capsys) -> None:
    """What failed, what was under way when it was cut, and what died; not what was done."""
    main = main_of_tool(tmp_path, monkeypatch)
    script = f"""
import sys, time
from contextlib import suppress
from pathlib import Path
from gpu_check.failures import unless_done
marks = Path({str(main.marks_of("models"))!r})
with unless_done(marks, "good"): pass
with suppress(ZeroDivisionError), unless_done(marks, "bad/llama"): 1 / 0
with unless_done(marks, "slow"): time.sleep(60)
"""
    monkeypatch.setattr(main, "command", lambda name, args: [sys.executable, "-P", "-c", script])
    on_a_gpu(main, monkeypatch, (main.Stage("models", 3, 0),), "--out", str(tmp_path / "table.md"))
    assert main.main() == 1
    assert "  failed: bad/llama\n  failed: slow\ngpu_check: models: not done after 3 s" in capsys.readouterr().out


def test_libraries_that_were_built_elsewhere_are_used(tool, tmp_path, monkeypatch) -> None:
    """Nothing is built; what this Python cannot load is refused."""
    from gpu_check import build

    monkeypatch.setattr(build, "build", None)
    monkeypatch.setattr(sys, "argv", ["build", str(tmp_path), f"--prebuilt={ROOT / 'csrc' / 'pkg'}"])
    build.main()
    package = tmp_path / "pkg" / "fuseline"
    assert (package / "demo" / "tokenizer.json").is_file() and len(list(package.glob("_C*.so"))) == 1
    wrong = tmp_path / "elsewhere"
    wrong.mkdir()
    (wrong / next(package.glob("_C*.so")).name).write_text("for another Python")
    with pytest.raises(RuntimeError, match="elsewhere cannot be loaded by"):
        build.make_package(package, wrong)


@pytest.mark.slow
def test_a_server_is_measured(tool, tmp_path, monkeypatch, capsys) -> None:
    """A real one, of a small shape, with random weights on the CPU: start, then one and two requests at once."""
    from gpu_check import failures, serve

    _, llama, _, tables = tool
    monkeypatch.setenv("FUSELINE_CACHE_ROOT", str(tmp_path / "cache"))
    model = serve.checkpoint(tmp_path / "model", llama.LLAMA_8B | SHAPE | {"vocab_size": 4200})
    load, found, marks = serve.Load((1, 2), 6, 5, least=2), tables.Table(), tmp_path / "marks"
    flags = ("--device", "cpu", "--max-model-len", "64", "--skip-model-check")
    assert serve.measure_serve(model, flags, load, found, marks) == []
    assert [row[0] for row in found.rows] == ["serve, start to healthy"] + [
        f"serve, {count} at once, 6 in, 5 out: {what}"
        for count in (1, 2) for what in ("throughput", "first token", "between tokens")
    ]  # fmt: skip
    assert not any("FAILED" in value for _, value, *_ in found.rows)
    assert serve.measure_serve(model, ("--max-model-len", "nothing"), load, found, marks) == ["serve, start to healthy"]
    assert found.rows[-1][1].startswith("FAILED: RuntimeError: ended with status 2: ")
    assert failures.undone(marks) == ["serve, start to healthy"]
    assert "max-model-len" in capsys.readouterr().out


def test_tests_that_failed_are_known_though_the_stage_was_killed(tool, tmp_path, monkeypatch, capsys) -> None:
    """And run first the next time; a run that finds nothing leaves nothing to print."""
    main = main_of_tool(tmp_path, monkeypatch)
    tests = tmp_path / "test_some.py"
    tests.write_text("import time\ndef test_fine(): pass\ndef test_bad(): assert 0\ndef test_slow(): time.sleep(60)\n")
    script = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "gpu_check.on_gpu", "-p", "no:cacheprovider",
              "-c", "/dev/null", "--rootdir", str(tmp_path), "--failures", str(tmp_path), str(tests)]  # fmt: skip
    monkeypatch.setattr(main, "command", lambda name, args: script)
    on_a_gpu(main, monkeypatch, (main.Stage("tests", 25, 0),), "--out", str(tmp_path / "table.md"))
    assert main.main() == 1
    assert "  failed: test_some.py::test_bad\ngpu_check: tests: not done after 25 s" in capsys.readouterr().out
    rows = (tmp_path / "table.md").read_text()
    assert "| tests: test_some.py::test_bad | failed, or not done |" in rows
    assert "| stage tests | not done after 25 s | 25 s |" in rows
    tests.write_text(tests.read_text().replace("assert 0", "pass").replace("60", "0"))
    assert main.failures.now(tmp_path) == ["test_some.py::test_bad"], "of the run that was killed"
    main.failures.begin(tmp_path)
    ordered = subprocess.run([*script, "-vv"], env=main.environment(), capture_output=True, text=True).stdout
    assert ordered.index("test_bad") < ordered.index("test_fine")
    assert main.failures.now(tmp_path) == [] and main.failures.before(tmp_path) == ["test_some.py::test_bad"]


def test_parts_after_a_lost_gpu_are_another_process(tool, tmp_path) -> None:
    from gpu_check import failures, measure

    _, _, _, tables = tool
    table, log, marks = tables.Table.begun(tmp_path / "table.md", "a GPU"), [], tmp_path / "marks"
    table.add("copy", "3 TB/s", "", "x")

    def lose() -> None:
        raise RuntimeError("illegal | memory access\nand more")

    class StartedAgain(BaseException):
        pass

    def start_again(num_done: int) -> None:
        log.append(num_done)
        raise StartedAgain

    parts = [("first", lambda: log.append("first")), ("lost", lose), ("last", lambda: log.append("last"))]
    with pytest.raises(StartedAgain):
        measure.run_parts(parts, 0, (table, marks), lambda: True, start_again)
    resumed = tables.Table.resumed(tmp_path / "table.md")
    assert (resumed.title, resumed.rows) == (table.title, table.rows) and len(resumed.rows) == 2
    assert measure.run_parts(parts, 2, (resumed, marks), lambda: True, start_again) == []
    assert log == ["first", 2, "last"]
    assert measure.run_parts(parts, 0, (resumed, marks), lambda: False, start_again) == ["lost"] and log[-1] == "last"
    assert failures.undone(marks) == ["lost"]


def test_a_model_that_cannot_be_built_is_not_built_again(tool) -> None:
    from gpu_check import measure

    built = []
    once = measure.Once(lambda: built.append(1) or 1 / 0)
    for error in (ZeroDivisionError, RuntimeError):
        with pytest.raises(error):
            once()
    assert built == [1]


def test_every_kernel_is_measured(tool) -> None:
    kernels, _, _, tables = tool
    sizes = kernels.Sizes(32, 64, 48, 4, 2, 16, (1, 2), 32, 130, 2, 4, 1 << 10, 16, 16, product_rows=(1, 130))
    found = tables.Table()
    limits = kernels.measure_limits(sizes, "cpu", TRIAL, found)
    kernels.measure_kernels(sizes, GPU, TRIAL, limits, found)
    names = " ".join(row[0] for row in found.rows)
    for name in ("copy", "add_rms_norm, 32 x 64, triton", "layer_norm, 1 x 64, triton", "act_mul, 32 x 48, triton",
                 "rope_cache, 32 x 4 + 2 heads, triton", "route_topk, 32 x 2 of 4, triton",
                 "attention, decode 2 x 32", "attention, decode 1 x 16", "prompt of 32", "greedy", "top_k",
                 "linear of 130 rows, 64 -> 96, torch.linear", "linear of 1 rows, 64 -> 96, triton.linear",
                 "linear of 1 rows, 48 -> 64", "linear_act_mul of 1 rows, 64 -> 96, triton",
                 "linear_code_rows, int4 1 x 64 -> 96, triton", "linear_fp8, 1 x 64 -> 96, triton",
                 "experts, 16 tokens x 2 of 4, triton.experts 64x128",
                 "linear, 64 x 48 -> 64, invariant", "decode 2 x 32, invariant"):  # fmt: skip
        assert name in names
    is_tuning = [", triton.linear " in row[0] for row in found.rows]
    assert is_tuning.index(True) > max(k for k, row in enumerate(found.rows) if row[0].endswith("triton.experts"))
    assert found.text("a GPU").count("\n") == 4 + len(found.rows)


def test_what_fails_is_marked_and_the_file_holds_what_was_measured(tool, tmp_path) -> None:
    kernels, _, _, tables = tool
    found = tables.Table(tmp_path / "table.md", "a GPU")

    def broken() -> None:
        raise RuntimeError("out of resource")

    cases = [
        kernels.Case("no", broken, moved=1), kernels.Case("tuning", broken, moved=1, is_tuning=True),
        kernels.Case("fine", lambda: None, moved=1),
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="1 failed: no$"):
        kernels.measure_cases(cases, TRIAL, Limits(1.0, 1.0), found)
    assert [row[0] for row in found.rows] == ["no", "tuning", "fine"]
    assert found.rows[0][1] == found.rows[1][1] == "FAILED: RuntimeError: out of resource"
    assert (tmp_path / "table.md").read_text() == found.text("a GPU")


def test_every_kernel_in_cpp_is_measured(tool, monkeypatch) -> None:
    kernels, _, _, tables = tool
    library = cuda_emulator.emulator()
    monkeypatch.setattr(cuda_library, "library_for", lambda target: library)
    sizes = kernels.Sizes(32, 64, 48, 4, 2, 64, (1, 2), 32, 130, 2, 4, 1 << 10, 16, 16, product_rows=(1,))
    found = tables.Table()
    kernels.measure_kernels(sizes, GPU, TRIAL, Limits(1e9, 1e9), found)
    names = [row[0] for row in found.rows]
    ours = [one for each in implementations("cuda").values() for one in each if not one.isas or GPU.isa in one.isas]
    declared = {one.label for one in ours if one.label.startswith("cuda.")}
    assert len(declared) > 8
    for label in declared - {label for one in ours for label in one.hides}:
        assert any(name.endswith(f", {label}") for name in names), label


def test_a_model_is_measured(tool, tmp_path) -> None:
    _, llama, serving, tables = tool
    from gpu_check import overlap

    load, found = llama.small(llama.Load()), tables.Table()
    runner = llama.Runner(tmp_path, GPU, load, llama.LLAMA_8B | SHAPE)
    llama.measure_model(runner, load, Limits(1e9, 1e9), found, FakeGraphs())
    assert [row[0] for row in found.rows] == [
        "graphs: 1 of 1 of decode steps, 1 of 1 of whole mixed steps, 1 of 1 piecewise", "decode 1 x 20",
        "decode 1 x 20, host", "decode 2 x 20", "decode 2 x 20, host", "first token of 24",
    ]  # fmt: skip
    overlap.measure_overlap(runner, GPU, load, Limits(1e9, 1e9), found, FakeGraphs())
    assert [row[0] for row in found.rows[-2:]] == [
        "decode 1 x 20, one after the other", "decode 1 x 20, early launches off",
    ]  # fmt: skip
    serving.measure_serving(runner, FakeGpu(runner.model), serving.Batch(2, 6, 5, 8), found)
    names = [row[0] for row in found.rows[-3:]]
    assert names == ["engine, 2 x 6 in, 5 out", "engine, a decode step", "engine, GPU idle between decode steps"]


def test_a_quantized_model_is_measured(tool, tmp_path) -> None:
    _, llama, serving, tables = tool
    from gpu_check import quantized

    name, load, found = "int4", llama.small(llama.Load()), tables.Table()
    load = replace(load, batches=(1,), graphs=GraphConfig((1,), mixed_sizes=()))
    runner = llama.Runner(tmp_path, GPU, load, llama.LLAMA_8B | SHAPE, quantization=name)
    assert all(weight.dtype == torch.int32 for key, weight in runner.weights.items() if key.endswith("codes"))
    assert torch.isfinite(runner.model.run(runner.prompt(9)).logits).all()
    quantized.measure_steps(runner, name, load, Limits(1e9, 1e9), found, FakeGraphs())
    serving.measure_serving(runner, FakeGpu(runner.model), serving.Batch(2, 6, 5, 8), found, f"{name}: ")
    assert [row[0] for row in found.rows] == [f"{name}: {what}" for what in (
        "decode 1 x 20", "first token of 24", "engine, 2 x 6 in, 5 out", "engine, a decode step",
        "engine, GPU idle between decode steps",
    )]  # fmt: skip


def test_the_peer_computes_with_the_same_weights(tool, tmp_path, monkeypatch) -> None:
    """In the same memory; both are measured, with the same prompts."""
    _, llama, serving, tables = tool
    from gpu_check import peer

    load, found = llama.small(llama.Load()), tables.Table()
    runner = llama.Runner(tmp_path, GPU, load, llama.LLAMA_8B | SHAPE)
    model = peer.peer_of(runner, tmp_path)
    prompt, owned = runner.prompt(24), {t.untyped_storage().data_ptr() for t in runner.parameters().values()}
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == owned
    with torch.no_grad():
        want = model(input_ids=prompt.token_ids[None]).logits[0, -1].float()
    torch.testing.assert_close(runner.model.run(prompt).logits[0].float(), want, rtol=0.02, atol=0.02)
    asked = []

    def generate_all(peer_model, same_runner, batch):
        asked.append(serving.prompts_of(batch, runner.model.info.vocab_size))
        return [[1] * batch.generated] * batch.num_seqs

    monkeypatch.setattr(peer, "generate_all", generate_all)
    batch = serving.Batch(2, 6, 5, 8)
    peer.against_transformers(runner, FakeGpu(runner.model), found, tmp_path, batch)
    assert len(asked) == 2 and [len(prompt) for prompt in asked[0]] == [6, 6]
    assert [row[0] for row in found.rows] == ["2 x 6 in, 5 out", "the same by transformers' continuous batching"]


def test_early_launches_are_compared(tool) -> None:
    """Results that differ are counted: here those of a library that has lost a kernel."""
    kernels, _, _, tables = tool
    from gpu_check.overlap import check_overlap

    class Loses(cuda_library.CudaLibrary):
        def call(self, name: str, on: torch.Tensor, **fields: object) -> None:
            if self.overlap != cuda_library.Overlap.WEIGHTS or name != "rope_cache":
                super().call(name, on, **fields)

    sizes = kernels.Sizes(hidden=64, inner=48, heads=4, kv_heads=2, head_dim=64)
    loses = copy.copy(cuda_emulator.emulator())
    loses.__class__ = Loses
    for lib, wrong in ((cuda_emulator.emulator(), 0), (loses, 2 * 2 * 2)):
        found = tables.Table()
        make = kernels.Made(sizes, "cpu")
        assert check_overlap(sizes, make, lib, FakeGraphs(), found, TRIAL, num_replays=2) == wrong
        names = [row[0] for row in found.rows]
        assert names[1:3] == ["chain of 1 rows, one after the other", "chain of 1 rows, early"] and len(names) == 6


def test_layers_are_measured_by_the_kernel_of_their_products(tool) -> None:
    kernels, _, _, tables = tool
    from gpu_check import chains

    sizes, found = kernels.Sizes(hidden=64, inner=48, heads=4, kv_heads=2, head_dim=64), tables.Table()
    more = (FakeGraphs(), found, TRIAL, Limits(1e9, 1e9))
    chains.measure_chains(sizes, kernels.Made(sizes, "cpu"), cuda_emulator.emulator(), *more, 1, (4,))
    names = [row[0] for row in found.rows]
    assert len(names) == len(set(names)) == 2 * len(chains.KINDS) + 2
    assert "layers of 4 rows, few rows, overlap weights" in names
    assert "layers of 4 rows, persistent between attentions" in names
    assert not any("FAILED" in row[1] for row in found.rows)
    chains.measure_chains(sizes, kernels.Made(sizes, "cpu"), None, *more)
    assert found.rows[-1][:2] == ("chains of layers", "not measured: no CUDA C++ kernels")


@pytest.mark.parametrize("has_library", [True, False])
def test_early_launches_are_a_part_of_the_models(tool, monkeypatch, capsys, has_library: bool) -> None:
    """With graphs as they are captured on a GPU."""
    kernels, _, _, tables = tool
    from gpu_check import models

    FakeCuda().install(monkeypatch)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: None)
    sizes = kernels.Sizes(hidden=64, inner=48, heads=4, kv_heads=2, head_dim=64)
    library = cuda_emulator.emulator() if has_library else None
    # Nobody replays the recorded launches, so they differ from those that run.
    assert models.check_early_launches(library, sizes, "cpu", lambda: TRIAL, num_replays=1) == has_library
    assert ("overlap HEADS: DIFFERS" in capsys.readouterr().out) == has_library


def test_what_is_gained_by_measuring_is_shown(tool, tmp_path, monkeypatch) -> None:
    from fuseline.compile.tuning import kernels as tune_gpu

    _, llama, _, tables = tool
    from gpu_check import tune

    monkeypatch.setattr(tune_gpu, "DeviceTimer", lambda: lambda candidate, _: 0.1 if "7s" in candidate.label else 1.0)
    monkeypatch.setenv("FUSELINE_CACHE_ROOT", str(tmp_path / "cache"))
    load, found = llama.small(llama.Load()), tables.Table()
    tune.compare(tmp_path, GPU, load, found, llama.LLAMA_8B | SHAPE)
    rows = [f"{what}: {value}" for what, value, *_ in found.rows]
    assert any(row.startswith("-O3: kernel: 2 x triton.paged_attention 7s") for row in rows)
    assert not any(row.startswith("default: kernel: 2 x triton.paged_attention 7s") for row in rows)
    assert sum("decode" in row for row in rows) == 2 * len(load.batches)
    assert "-O3: runs of ops in one launch: up to 0 rows" in rows, "there are no kernels in C++"


def test_mixed_steps_are_measured(tool, tmp_path) -> None:
    _, llama, _, tables = tool
    from gpu_check.mixed import measure_mixed

    load, found, api = llama.small(llama.Load()), tables.Table(), FakeGraphs()
    runner = llama.Runner(
        tmp_path, GPU, replace(load, graphs=GraphConfig((1,), mixed_sizes=(8,), is_mixed_whole=True)),
        llama.LLAMA_8B | SHAPE,
    )  # fmt: skip
    runner.capture(api)
    measure_mixed(runner, 1, (3,), 5, found)
    names = ("whole", "piecewise", "op by op")
    assert [row[0] for row in found.rows] == [f"step of 1 + 3 tokens, {name}" for name in names]
    assert api.segment_replays == 20 * (SHAPE["num_hidden_layers"] + 1) and len(api.replays) == 20
    assert len(runner.model.graphs.whole_mixed.captured) == 1 and runner.model.graphs is not None


def test_tensors_are_carried_to_the_gpu_and_back_as_they_lie(tool) -> None:
    """Views of one storage stay views of one; what is written there is here afterwards."""
    from gpu_check import on_gpu

    whole = torch.arange(12.0).reshape(3, 4)
    carried = on_gpu.Carried("cpu")
    a, b, other = (carried.there(x) for x in (whole[1:, ::2], whole.T, 5))
    assert other == 5 and torch.equal(a, whole[1:, ::2]) and a.stride() == (4, 2)
    a.fill_(-1)
    assert torch.equal(b.T[1:, ::2], a) and whole[1, 0] == 4
    carried.back()
    assert (whole[1:, ::2] == -1).all() and whole[0, 0] == 0
