"""A captured graph read from the cache is the one that was captured, or the cache is not used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import zoo
from torch import SymInt, Tensor, fx

from fuseline.compile.cache import files as cache
from fuseline.compile.cache import keys, store
from fuseline.compile.capture import artifact
from fuseline.compile.capture.artifact import load_or_capture
from fuseline.compile.capture.captured import CapturedModel
from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.capture.export import capture_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.graph_json import GraphFormatError, decode, encode, evaluate


@pytest.fixture
def config(tmp_path):
    def make(family: str, **settings) -> CompileConfig:
        zoo.config_of(family).save_pretrained(tmp_path / family)
        return CompileConfig(model=str(tmp_path / family), cache_dir=str(tmp_path / "cache"), **settings)

    return make


@pytest.fixture(scope="module")
def captured_once(tmp_path_factory) -> CapturedModel:
    folder = tmp_path_factory.mktemp("llama")
    zoo.config_of("llama").save_pretrained(folder)
    return capture_model(CompileConfig(model=str(folder)))


@pytest.fixture
def llama(captured_once, monkeypatch) -> CapturedModel:
    """The model that every capture gives in this test."""
    monkeypatch.setattr(artifact, "capture_model", lambda config: captured_once)
    return captured_once


@pytest.fixture
def never_capture(monkeypatch):
    """Call it when from now on all must come from the cache."""

    def refuse(config):
        raise AssertionError("captured again")

    return lambda: monkeypatch.setattr(artifact, "capture_model", refuse)


def warnings_in(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == store.logger.name]


def described(value: object) -> object:
    """A meta value by all that passes can see of it; sizes as arithmetic on T."""
    if isinstance(value, Tensor):
        sizes = [described(size) for size in (*value.shape, *value.stride(), value.storage_offset())]
        return type(value), value.dtype, value.device, value.ndim, *sizes
    if isinstance(value, SymInt):
        (symbol,) = value.node.expr.free_symbols
        limits = value.node.shape_env.var_to_range[symbol]
        return str(value.node.expr).replace(str(symbol), "T"), value.node.hint, limits.lower, limits.upper
    return [described(item) for item in value] if isinstance(value, (list, tuple)) else value


def assert_same_nodes(found: fx.GraphModule, expected: fx.GraphModule) -> None:
    position = [{node: at for at, node in enumerate(module.graph.nodes)} for module in (found, expected)]
    for one, two in zip(found.graph.nodes, expected.graph.nodes, strict=True):
        assert (one.name, one.op, one.target) == (two.name, two.op, two.target)
        seen = [
            fx.node.map_arg((node.args, node.kwargs), lambda other, at=at: f"node {at[other]}")
            for node, at in ((one, position[0]), (two, position[1]))
        ]
        assert repr(seen[0]) == repr(seen[1])  # repr: 1 and 1.0 differ
        assert one.meta.keys() == two.meta.keys() and one.meta.get("fqn") == two.meta.get("fqn")
        assert described(one.meta["val"]) == described(two.meta["val"])
    found.graph.lint()
    assert found.code == expected.code


def assert_same(found: CapturedModel, expected: CapturedModel) -> None:
    assert_same_nodes(found.graph, expected.graph)
    assert (found.dtype, found.parameters, found.tied) == (expected.dtype, expected.parameters, expected.tied)
    assert found.rope_switch == expected.rope_switch
    assert found.facts == expected.facts
    assert found.constants.keys() == expected.constants.keys()
    for name, value in found.constants.items():
        assert value.dtype == expected.constants[name].dtype and torch.equal(value, expected.constants[name])


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "gpt2", "opt", "deepseek_v3", "gpt_oss", "qwen2_moe", "phi3_longrope", "gpt_neox"]
)
def test_the_cached_model_is_the_captured_one(config, never_capture, family):
    settings = config(family, dtype="bfloat16")
    first = load_or_capture(settings)
    never_capture()
    assert_same(load_or_capture(settings), first)


def test_loading_takes_no_part_of_an_export(config, monkeypatch):
    settings = config("llama")
    load_or_capture(settings)
    monkeypatch.setattr(torch.export, "export", None)
    load_or_capture(settings)


def test_what_the_graph_depends_on_makes_the_key(config, tmp_path, monkeypatch):
    found = [keys.cache_key(config("llama"))]
    found.append(keys.cache_key(config("llama", dtype="bfloat16")))
    found.append(keys.cache_key(config("llama", hf_overrides=(("rope_theta", 5.0),))))
    found.append(keys.cache_key(config("mistral")))
    same = config("llama", max_num_seqs=3, cpu_threads=1, seed=9, max_num_batched_tokens=64)
    assert keys.cache_key(same) == found[0]
    for package in ("torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(keys, "version_of", lambda name, package=package: "0" if name == package else name)
            found.append(keys.cache_key(config("llama")))
    assert len(set(found)) == len(found)


def test_sources_make_the_keys(config, tmp_path, monkeypatch):
    """Those of capture and of the vocabulary both keys, the rest of the compiler that of the lowered graph."""
    copy = tmp_path / "compile"
    shutil.copytree(keys.SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(keys, "SOURCES", copy)
    settings = config("llama")
    before = keys.cache_key(settings), keys.optimized_key(settings)
    for name, changes in (("passes/clean.py", (False, True)), ("ops/norm.py", (True, True)),
                          ("capture/export.py", (True, True))):  # fmt: skip
        (copy / name).write_text((copy / name).read_text() + "# changed")
        after = keys.cache_key(settings), keys.optimized_key(settings)
        assert tuple(one != two for one, two in zip(before, after, strict=True)) == changes
        before = after


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: flip(data, len(data) // 2), "the file is damaged"),
        (lambda data: flip(data, 20), "the file is damaged"),
        (lambda data: data[:-5], "the file is damaged"),
        (lambda data: b"", "the file is damaged"),
        (lambda data: os.urandom(4000), "the file is damaged"),
        (lambda data: seal(b"\xff" * 50), "not a captured graph"),
        (lambda data: seal(b"\2" + b"\0" * 7 + b"{}"), "not a captured graph"),
    ],
)
def test_damaged_files_are_reported_once_and_replaced(config, llama, never_capture, caplog, damage, message):
    settings = config("llama")
    load_or_capture(settings)
    path = only_file(settings)
    path.write_bytes(damage(path.read_bytes()))
    assert load_or_capture(settings) is llama
    assert [message in text for text in warnings_in(caplog)] == [True]
    never_capture()
    assert_same_nodes(load_or_capture(settings).graph, llama.graph)


def test_the_file_of_another_model_is_not_taken(config, llama, caplog):
    load_or_capture(config("mistral"))
    other = only_file(config("mistral"))
    settings = config("llama")
    other.rename(other.with_name(keys.cache_key(settings)))
    assert_same_nodes(load_or_capture(settings).graph, llama.graph)
    assert "another model" in caplog.text


def seal(body: bytes) -> bytes:
    return cache.MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def only_file(config: CompileConfig):
    (path,) = Path(config.cache_dir, "graphs").iterdir()
    return path


def test_a_cache_that_cannot_be_written(config, llama, tmp_path, caplog):
    settings = config("llama")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert load_or_capture(settings) is llama
    assert ["is not cached in" in text for text in warnings_in(caplog)] == [True]


def test_a_full_disk_leaves_nothing_behind(config, llama, monkeypatch, caplog):
    settings = config("llama")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    load_or_capture(settings)
    assert "No space left on device" in caplog.text
    assert list(Path(settings.cache_dir, "graphs").iterdir()) == []


def test_a_graph_without_a_place_in_the_format_is_not_cached(config, llama, monkeypatch, caplog):
    first = next(node for node in llama.graph.graph.nodes if node.op == "call_function")
    monkeypatch.setattr(first, "target", print)
    assert load_or_capture(config("llama")) is llama
    assert "call of <built-in function print>" in caplog.text


def test_the_cache_root_comes_from_the_environment(config, llama, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSELINE_CACHE_ROOT", str(tmp_path / "root"))
    settings = config("llama")
    load_or_capture(CompileConfig(model=settings.model))
    assert len(list((tmp_path / "root" / "graphs").iterdir())) == 1


def test_errors_of_capture_come_through(config, tmp_path):
    with pytest.raises(CaptureError, match="no config.json"):
        load_or_capture(CompileConfig(model=str(tmp_path), cache_dir=str(tmp_path)))


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), 1.0, 1, True, None, "x", (1, [2.5]), torch.int8,
                                   torch.strided, torch.preserve_format, torch.device("cpu")])  # fmt: skip
def test_arguments_keep_their_value_and_type(value):
    graph = fx.Graph()
    graph.call_function(torch.ops.aten.zeros.default, ([3],), {"extra": value})
    graph.output(None)
    (node, _) = decode(json.loads(json.dumps(encode(graph))), 2, 64, 13).nodes
    assert repr(node.kwargs["extra"]) == repr(value) and type(node.kwargs["extra"]) is type(value)


@pytest.mark.parametrize("text", ["T", "2*T", "T*64 + 1", "FloorDiv(T, 2) - -3", "Mod(T, 4)", "T**2"])
def test_sizes_are_arithmetic(text):
    names = {"T": 13, "FloorDiv": lambda a, b: a // b, "Mod": lambda a, b: a % b}
    assert evaluate(text, 13) == eval(text, names)


@pytest.mark.parametrize("text", ["__import__('os')", "T.real", "[T]", "exec('1')", "T if T else 1", "1.5"])
def test_sizes_are_nothing_else(text):
    with pytest.raises(GraphFormatError):
        evaluate(text, 13)


@pytest.mark.parametrize("target", ["os.system.default", "operator.methodcaller", "aten.nothing.default", "c10d.x.y"])
def test_other_targets_are_refused(target):
    node = {
        "name": "a",
        "op": "call_function",
        "target": target,
        "args": {"tuple": []},
        "kwargs": {"dict": {}},
        "val": 0,
    }
    with pytest.raises(GraphFormatError):
        decode({"nodes": [node], "vals": [None]}, 2, 64, 13)
