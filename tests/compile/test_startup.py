"""The start: what a warm one leaves out, the cache's commands and bounds, and the bench that times it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

import pytest
import torch
import zoo
from python_process import run_python
from transformers import AutoModelForCausalLM, LlamaConfig

from fuseline.api.bench import startup
from fuseline.api.cli import main
from fuseline.compile import compiler
from fuseline.compile.cache import files as cache
from fuseline.compile.capture import unneeded
from fuseline.compile.capture.artifact import load_optimized
from fuseline.compile.capture.weights import load_weights
from fuseline.compile.config import CompileConfig

WARM = """
import sys
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target
compile_model(CompileConfig(model=sys.argv[1], cache_dir=sys.argv[2]), detect_target(1))
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "triton", "sympy"}))
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> CompileConfig:
    """A model that has been compiled once."""
    folder = tmp_path_factory.mktemp("cache")
    config = CompileConfig(model=str(zoo.checkpoint("qwen2")), cache_dir=str(folder))
    compiler.compile_model(config, compiler.Target("cpu", "", 1))
    return config


def test_a_warm_start_imports_neither_transformers_nor_a_shape_environment(started):
    """torch's own meta functions of common ops import sympy: a sixth of the start."""
    assert run_python(WARM, started.model, started.cache_dir) == "torch"


def test_a_cold_start_imports_no_triton(tmp_path):
    """Installed or not: without a GPU it would only take memory."""
    assert run_python(WARM, str(zoo.checkpoint("qwen2")), str(tmp_path)) == "sympy torch transformers"


def test_what_is_hidden_comes_back():
    import unittest.mock

    with unittest.mock.patch.dict(sys.modules):
        sys.modules.pop("this", None)
        with unittest.mock.patch.object(unneeded, "UNNEEDED", ("this", "json")):
            with unneeded.without_unneeded():
                with pytest.raises(ModuleNotFoundError):
                    import this  # noqa: F401
                import json as known
            assert known is json and "this" not in sys.modules


def test_loading_leaves_no_holes_in_the_heap(tmp_path):
    """Peak memory of loading: the weights, and little beside."""
    code = """
import sys
from fuseline.compile.capture import weights
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before, load = [], weights.load_weights
from fuseline.compile import compiler
compiler.load_weights = lambda *args, **options: (before.append(peak()), load(*args, **options))[1]
model = compile_model(CompileConfig(model=sys.argv[1], cache_dir=sys.argv[2]), detect_target(2))
print((peak() - before[0]) * 1024 - model.info.weight_bytes)
"""
    config = LlamaConfig(
        hidden_size=768, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=12, vocab_size=1024,
        max_position_embeddings=128,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    run_python(code, str(tmp_path / "model"), str(tmp_path / "cache"))  # captures
    assert int(run_python(code, str(tmp_path / "model"), str(tmp_path / "cache"))) < 40 << 20


def test_the_server_needs_no_torch():
    code = "import sys, fuseline.api.app, fuseline.api.server; print('torch' in sys.modules)"
    assert run_python(code) == "False"


def test_the_cached_lowered_model_is_the_lowered_one(started):
    cached, result = load_optimized(started)
    captured, made = compiler.optimize(started)
    assert [(n.op, n.target, str(n.args), str(n.kwargs)) for n in cached.graph.graph.nodes] == [
        (n.op, n.target, str(n.args), str(n.kwargs)) for n in captured.graph.graph.nodes
    ]
    assert result.specs == made.specs and result.stage_ops == made.stage_ops
    assert [r.name for r in result.reports] == [r.name for r in made.reports]
    assert all(torch.equal(result.constants[name], value) for name, value in made.constants.items())
    requests = compiler.weight_requests(captured.graph, made)
    assert compiler.weight_requests(cached.graph, result) == requests
    again, fresh = (
        load_weights(requests, captured, c) for c in (started, CompileConfig(started.model, cache_dir="/dev/null"))
    )
    assert all(torch.equal(again[name].view(torch.uint8), fresh[name].view(torch.uint8)) for name in requests)


def test_a_map_of_weights_that_lies_is_not_used(started, caplog):
    (path,) = [entry.path for entry in cache.entries(cache.Path(started.cache_dir)) if entry.kind == "weights"]
    whole = path.read_bytes()
    rows = json.loads(cache.read_file(path))
    name = next(name for name, row in rows.items() if row)
    rows[name][1][0][-1] = 1 << 40  # offset far behind the tensor's end
    cache.write_file(path, json.dumps(rows).encode())
    captured, result = load_optimized(started)
    load_weights(compiler.weight_requests(captured.graph, result), captured, started)
    assert "is no map of" in caplog.text and path.read_bytes() == whole


@pytest.mark.parametrize("trouble", ["no folder", "full disk"])
def test_a_cache_that_takes_nothing_is_reported_once(started, tmp_path, caplog, monkeypatch, trouble):
    folder = tmp_path / "cache"
    if trouble == "no folder":
        folder.write_text("a file where the folder should be")
    else:
        monkeypatch.setattr(cache.os, "fsync", lambda handle: _full())
    config = CompileConfig(model=started.model, cache_dir=str(folder))
    compiler.compile_model(config, compiler.Target("cpu", "", 1))
    assert ["is not cached in" in record.getMessage() for record in caplog.records].count(True) == 1


def _full() -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture
def files(tmp_path) -> list[cache.Path]:
    """Three cached files of 1000 bytes of body, the first unused for longest."""
    paths = [tmp_path / kind / name for kind, name in (("graphs", "a"), ("models", "b"), ("regions", "c"))]
    for age, path in enumerate(reversed(paths)):
        cache.write_file(path, bytes(1000))
        os.utime(path, (10_000 - age, 10_000 - age))
    return paths


def test_those_unused_for_longest_go_first(files, tmp_path):
    size = files[0].stat().st_size
    cache.prune(tmp_path, 2 * size)
    assert [path.exists() for path in files] == [False, True, True]
    cache.read_file(files[1])
    cache.prune(tmp_path, size)
    assert [path.exists() for path in files] == [False, True, False]


def test_the_file_just_written_stays(files, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MAX_BYTES", 10)
    cache.write_file(tmp_path / "models" / "new", bytes(100))
    assert [entry.path.name for entry in cache.entries(tmp_path)] == ["new"]


def test_files_of_others_are_left_alone(files, tmp_path):
    mine = tmp_path / "notes.txt"
    mine.write_text("mine")
    (tmp_path / "graphs" / "folder").mkdir()
    (tmp_path / "graphs" / "link").symlink_to(mine)
    cache.clear(tmp_path)
    assert mine.exists() and (tmp_path / "graphs" / "link").is_symlink() and (tmp_path / "graphs" / "folder").is_dir()


def test_kernels_of_triton_are_listed_and_deleted_as_folders(files, tmp_path):
    """A kernel without one of its files would not be compiled again."""
    kernel = tmp_path / "triton" / "k"
    kernel.mkdir(parents=True)
    for name in ("k.json", "k.cubin"):
        (kernel / name).write_bytes(bytes(3000))
    os.utime(kernel, (1, 1))
    (tmp_path / "triton" / "lock").write_text("")
    found = next(entry for entry in cache.entries(tmp_path) if entry.kind == "triton")
    assert (found.path, found.num_bytes) == (kernel, 6000)
    cache.prune(tmp_path, 3 * files[0].stat().st_size)
    assert not kernel.exists() and all(path.exists() for path in files)


KEPT = """
import sys
from fuseline.compile.target import keep_triton_kernels
keep_triton_kernels(sys.argv[1])
import triton
print(triton.knobs.cache.dir)
"""


def test_triton_keeps_kernels_in_the_cache_unless_told_where(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert run_python(KEPT, str(tmp_path)) == str(tmp_path / "triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert run_python(KEPT, str(tmp_path)) == "/elsewhere"


def test_list_and_clear(files, tmp_path, capsys):
    assert main(["cache", "list", "--cache-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["regions/c", "models/b", "graphs/a"]
    assert lines[3].startswith("3 files,")
    assert main(["cache", "clear", "--cache-dir", str(tmp_path)]) == 0
    assert "3 files removed" in capsys.readouterr().out
    assert cache.entries(tmp_path) == []


def test_a_cache_that_cannot_be_cleared(files, tmp_path, monkeypatch, capsys):
    def refuse(self, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.Path, "unlink", refuse)
    assert main(["cache", "clear", "--cache-dir", str(tmp_path)]) == 1
    assert "cannot be cleared" in capsys.readouterr().err


def test_no_time_of_a_start_is_left_out():
    ends = {"interpreter": 1.5, "settings": 2.0, "graph": 5.0, "application": 5.5, "first token": 7.0}
    seconds = startup.durations(1.0, ends)
    assert seconds == {
        "interpreter": 0.5, "settings": 0.5, "engine imports": 0.0, "graph": 3.0, "weights": 0.0, "engine": 0.0,
        "application": 0.5, "first token": 1.5,
    }  # fmt: skip
    assert sum(seconds.values()) == 7.0 - 1.0


def test_bench_startup_times_every_phase(capsys):
    model = str(zoo.checkpoint("qwen2"))
    assert main(["bench", "startup", model, "--json", "--cpu-threads", "1", "--num-gpu-blocks-override", "16"]) == 0
    starts = json.loads(capsys.readouterr().out)["starts"]
    assert [start["name"] for start in starts] == ["cold", "warm"]
    for start in starts:
        assert list(start["phases"]) == list(startup.PHASES)
        assert sum(start["phases"].values()) == pytest.approx(start["total"], abs=1e-3)
        assert min(start["phases"][name] for name in ("interpreter", "engine imports", "graph", "first token")) > 0


def test_bench_startup_says_why_a_server_does_not_start(tmp_path, capsys):
    assert main(["bench", "startup", str(tmp_path / "nothing")]) == 1
    assert "the server did not start: model '" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def no_default_cache(monkeypatch, tmp_path) -> Iterator[None]:
    monkeypatch.setenv("FUSELINE_CACHE_ROOT", str(tmp_path / "default"))
    yield
