"""Weights in every format: real files give the tokens of the safetensors, damaged ones one line that names them."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from load_format_files import WRITERS, write
from paged_driver import greedy
from safetensors.torch import load_file, save_file

from fuseline.api.cli import main
from fuseline.api.config import ConfigError
from fuseline.api.config_resolve import resolve
from fuseline.api.start_check import try_start
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.capture.lazy_tensor import whole
from fuseline.compile.capture.load_formats import open_weights
from fuseline.compile.capture.reader import Reader
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target

PROMPTS = zoo.make_prompts([3, 20])
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def load_format(kind: str) -> str:
    return kind.partition("-")[0]


def tokens(folder: Path, cache: str, **settings: object) -> list[list[int]]:
    config = CompileConfig(str(folder), cache_dir=cache, skip_model_check=True, **settings)
    return greedy(compile_model(config, detect_target()), PROMPTS, 8)


@functools.cache
def plain_tokens(family: str, dtype: str, cache: str) -> list[list[int]]:
    return tokens(zoo.checkpoint(family, dtype), cache)


@pytest.mark.parametrize("kind", WRITERS)
def test_tokens_are_those_of_the_safetensors(kind: str, tmp_path: Path, cache: str) -> None:
    folder = write(kind, tmp_path / "model", dtype="bfloat16")
    want = plain_tokens("llama", "bfloat16", cache)
    dtype = {"dtype": "bfloat16"}  # a file of Mistral's format says nothing of it
    assert tokens(folder, cache, load_format=load_format(kind), **dtype) == want
    try_start(resolve({"model": str(folder), "load_format": load_format(kind), "skip_tokenizer_init": True}))
    if kind in ("pt", "pt-shards", "safetensors-shards", "mistral"):
        assert tokens(folder, cache, **dtype) == want  # auto finds them


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_models_of_mistral_in_their_own_format(family: str, tmp_path: Path, cache: str) -> None:
    """Windows, heads of a width of their own, experts."""
    folder = write("mistral", tmp_path / "model", family)
    assert tokens(folder, cache, dtype="float32") == plain_tokens(family, "float32", cache)


def test_an_image_of_numpy_serves_the_next_start(tmp_path: Path, cache: str, caplog) -> None:
    folder = write("npcache", tmp_path / "model")
    settings = {"load_format": "npcache", "dtype": "float32"}
    want = plain_tokens("llama", "float32", cache)
    assert tokens(folder, cache, **settings) == want
    names = json.loads((folder / "np" / "weight_names.json").read_text())
    stored = load_file(zoo.checkpoint("llama") / "model.safetensors")
    assert set(names) == set(stored)
    assert np.array_equal(np.load(folder / "np" / UP), stored[UP].numpy())
    before = (folder / "np" / UP).stat().st_mtime_ns
    assert tokens(folder, cache, **settings) == want and (folder / "np" / UP).stat().st_mtime_ns == before
    # It is that of the file: another one makes another.
    torch.save({name: torch.zeros_like(value) for name, value in stored.items()}, folder / "pytorch_model.bin")
    assert tokens(folder, cache, **settings) != want and not np.load(folder / "np" / UP).any()
    (folder / "np" / UP).write_bytes(b"nothing")
    with pytest.raises(LoadError, match=rf"{UP} in .*/np/{UP} cannot be read .*: remove .*/np to have it made anew"):
        tokens(folder, cache, **settings)


def test_a_folder_that_cannot_be_written_is_read_as_it_is(tmp_path: Path, cache: str, caplog, monkeypatch) -> None:
    folder = write("npcache", tmp_path / "model")

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with caplog.at_level(logging.WARNING):
        found = open_weights(CompileConfig(str(folder), load_format="npcache"))
    assert found[UP].path == folder / "pytorch_model.bin" and "cannot be written" in caplog.text


def test_shards_are_written_read_and_written_again(tmp_path: Path, cache: str, capsys) -> None:
    source, output = str(zoo.checkpoint("llama")), tmp_path / "out"
    name = "state-{rank}-{part}.safetensors"
    arguments = ["save-sharded-state", source, "-o", str(output), "--file-pattern", name, "--max-file-size"]
    assert main([*arguments, "40k"]) == 0
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == "state-0-0.safetensors" and f"{len(files)} files" in capsys.readouterr().err
    extra = (("pattern", name),)
    settings = {"load_format": "sharded_state", "model_loader_extra_config": extra, "dtype": "float32"}
    assert tokens(output, cache, **settings) == plain_tokens("llama", "float32", cache)
    assert (output / "config.json").read_bytes() == (Path(source) / "config.json").read_bytes()
    assert main([*arguments, "1G"]) == 0
    assert [path.name for path in output.glob("*.safetensors")] == ["state-0-0.safetensors"]
    assert tokens(output, cache, **settings) == plain_tokens("llama", "float32", cache)
    assert not list(output.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("-o {model}", "is the model's own directory"), ("-o {tmp}/x --file-pattern x.safetensors", "--file-pattern"),
        ("-o {tmp}/x --file-pattern {{rank}}/{{part}}", "--file-pattern"),
        ("-o {tmp}/x --max-file-size 0", "at least 1"),
        ("-o {tmp}/x --load-format dummy", "--load-format dummy"), ("-o {model}/config.json/x", "Not a directory"),
        ("-o {tmp}/x --load-format pt", "pytorch_model.bin"),
    ],
)  # fmt: skip
def test_shards_that_cannot_be_written(arguments: str, words: str, tmp_path: Path, capsys) -> None:
    model = zoo.checkpoint("llama")
    parts = arguments.format(model=model, tmp=tmp_path).split()
    assert main(["save-sharded-state", str(model), *parts]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]


def file_of(folder: Path, kind: str) -> Path:
    """A file that holds UP."""
    found = {
        "pt": "pytorch_model.bin", "npcache": "pytorch_model.bin", "tensorizer": "model.tensors",
        "mistral": "consolidated.safetensors", "auto": "model.safetensors", "runai_streamer": "model.safetensors",
    }  # fmt: skip
    return folder / found[kind] if kind in found else sorted(folder.glob("model-rank-0-part-*.safetensors"))[-1]


SINGLE = ("pt", "npcache", "auto", "tensorizer", "sharded_state", "mistral", "runai_streamer")


@pytest.mark.parametrize("kind", SINGLE)
def test_a_file_that_is_cut_off(kind: str, tmp_path: Path) -> None:
    folder = write(kind, tmp_path / "model")
    path = file_of(folder, kind)
    whole_file = path.read_bytes()
    for length in (len(whole_file) - 100, len(whole_file) // 2, 9, 0):
        path.write_bytes(whole_file[:length])
        with pytest.raises(LoadError, match=path.name) as caught:
            open_weights(CompileConfig(str(folder), load_format=load_format(kind)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", SINGLE)
def test_a_file_that_is_missing(kind: str, tmp_path: Path) -> None:
    folder = write(kind, tmp_path / "model")
    path = file_of(folder, kind)
    path.unlink()
    with pytest.raises(LoadError, match=path.name.replace("0-part-5", "0-part-")):
        open_weights(CompileConfig(str(folder), load_format=load_format(kind)))


@pytest.mark.parametrize("kind", ["pt-shards", "safetensors-shards", "sharded_state"])
def test_one_of_several_files_is_missing(kind: str, tmp_path: Path) -> None:
    folder = write(kind, tmp_path / "model")
    first = {"pt-shards": "weights-00002-of-00002.pt", "safetensors-shards": "shard-00001-of-00002.safetensors",
             "sharded_state": "model-rank-0-part-1.safetensors"}[kind]  # fmt: skip
    (folder / first).unlink()
    with pytest.raises(LoadError, match=f"{first} is missing"):
        open_weights(CompileConfig(str(folder), load_format=load_format(kind)))


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_a_tensor_that_is_missing_or_of_another_shape(kind: str, fault: str, tmp_path: Path, cache: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(zoo.checkpoint("llama"), source)
    state = load_file(source / "model.safetensors")
    state[UP] = state[UP][:-4].contiguous()
    save_file({name: value for name, value in state.items() if fault != "missing" or name != UP},
              source / "model.safetensors")  # fmt: skip
    folder = tmp_path / "model"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    WRITERS[kind](folder, load_file(source / "model.safetensors"), source)
    words = f"{UP} is not in the weights" if fault == "missing" else rf"{UP} in {folder}.* has shape \[92, 64\]"
    with pytest.raises(LoadError, match=words):
        tokens(folder, cache, load_format=load_format(kind), dtype="float32")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, float("nan")]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}, {"dtype": "F32", "shape": [2, 2]},
        {"dtype": "F32", "shape": [2.0, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16, 3]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}, [1], 3, None,
    ],
    ids=str,
)  # fmt: skip
def test_damaged_headers(entry: object, tmp_path: Path) -> None:
    body = json.dumps({"w": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(body).to_bytes(8, "little") + body + bytes(16))
    with pytest.raises(LoadError, match="model.safetensors") as caught:
        open_weights(CompileConfig(str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": None}, "dim must be a number above 0"), ({"n_heads": -3}, "n_heads must be"),
        ({"hidden_dim": 96.5}, "hidden_dim must be"), ({"head_dim": "16"}, "head_dim must be"),
        ({"norm_eps": True}, "norm_eps must be"), ({"vocab_size": 1e300}, "vocab_size must be"),
        ({"moe": {"num_experts": 4}}, "moe must be an object with num_experts and num_experts_per_tok"),
        ({"sliding_window": [None, 8]}, "sliding_window must be"),
        ({"yarn": {"factor": 2}}, "yarn must be an object with factor"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization: quantized weights of this format"),
        ({"model_type": "mamba"}, "model_type: only transformers"), ({"q_lora_rank": 8}, "q_lora_rank: latent"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_mistral_that_cannot_be_served(changes: dict, words: str, tmp_path: Path) -> None:
    params = {"dim": 64, "n_layers": 3, "hidden_dim": 96, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": 128}
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert resolve({"model": str(tmp_path)}).engine.compile.max_model_len == 128_000
    (tmp_path / "params.json").write_text(json.dumps(params | changes))
    with pytest.raises(ConfigError, match=f"params.json: {words}"):
        resolve({"model": str(tmp_path)})


def test_the_format_of_the_settings_can_be_chosen(tmp_path: Path) -> None:
    params = {"dim": 64, "n_layers": 3, "hidden_dim": 96, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": 128}
    (tmp_path / "params.json").write_text(json.dumps(params | {"max_seq_len": 512}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64}))
    for config_format, length in (("auto", 64), ("hf", 64), ("mistral", 512)):
        found = resolve({"model": str(tmp_path), "config_format": config_format})
        assert found.engine.compile.max_model_len == length
    (tmp_path / "params.json").unlink()
    with pytest.raises(ConfigError, match="has no params.json"):
        resolve({"model": str(tmp_path), "config_format": "mistral"})


def test_heads_that_rotate_in_pairs(tmp_path: Path) -> None:
    """A pair of rows is one number of the complex plane; Transformers has its parts half a head apart."""
    folder = write("mistral", tmp_path / "model")
    stored = load_file(folder / "consolidated.safetensors")["layers.0.attention.wk.weight"]
    found = open_weights(CompileConfig(str(folder), load_format="mistral"))["model.layers.0.self_attn.k_proj.weight"]
    with Reader() as reader:
        value = reader.value(whole(found))
    assert torch.equal(value[:8], stored[0:16:2]) and torch.equal(value[8:16], stored[1:16:2])


def test_both_formats_in_one_folder(tmp_path: Path, cache: str) -> None:
    """The same names and shapes, and other orders of rows: what is remembered of one is not that of the other."""
    folder = write("mistral", tmp_path / "model")
    shutil.copy(zoo.checkpoint("llama") / "config.json", folder)
    shutil.copy(zoo.checkpoint("llama") / "model.safetensors", folder)
    want = plain_tokens("llama", "float32", cache)
    for load_format in ("mistral", "auto", "mistral"):
        assert tokens(folder, cache, load_format=load_format) == want


def test_a_stream_of_tensorizer_is_found_where_the_flag_says(tmp_path: Path, cache: str) -> None:
    folder = write("tensorizer", tmp_path / "model")
    path = shutil.move(folder / "model.tensors", tmp_path / "other name.tensors")
    want = plain_tokens("llama", "float32", cache)
    for uri in (str(path), f"file://{str(path).replace(' ', '%20')}"):
        extra = (("tensorizer_uri", uri), ("verify_hash", True))
        found = tokens(folder, cache, load_format="tensorizer", model_loader_extra_config=extra, dtype="float32")
        assert found == want
    with pytest.raises(LoadError, match="model.tensors: name it with tensorizer_uri"):
        open_weights(CompileConfig(str(folder), load_format="tensorizer"))
    remote = (("tensorizer_uri", "s3://bucket/model.tensors"),)
    with pytest.raises(LoadError, match="s3://bucket/model.tensors is no local file"):
        open_weights(CompileConfig(str(folder), load_format="tensorizer", model_loader_extra_config=remote))


def test_the_streamer_is_told_its_limits(tmp_path: Path, cache: str) -> None:
    folder = write("runai_streamer", tmp_path / "model")
    extra = (("concurrency", 3), ("memory_limit", 8 << 20))
    found = tokens(folder, cache, load_format="runai_streamer", model_loader_extra_config=extra, dtype="float32")
    assert found == plain_tokens("llama", "float32", cache)


@pytest.mark.parametrize("name", ["tensorizer", "runai_streamer"])
def test_a_package_that_is_not_installed_is_named(name: str, monkeypatch) -> None:
    monkeypatch.setattr("fuseline.compile.load_format.find_spec", lambda module: None)
    model = str(zoo.checkpoint("llama"))
    cure = rf"is not installed: pip install 'fuseline\[{name}\]'"
    with pytest.raises(ConfigError, match=rf"--load-format {name}: .* {cure}"):
        resolve({"model": model, "load_format": name})
    with pytest.raises(LoadError, match=cure):
        open_weights(CompileConfig(model, load_format=name))


@pytest.mark.parametrize(
    ("load_format", "extra", "words"),
    [
        ("auto", {"x": 1}, "no key 'x' for --load-format auto"), ("dummy", {"num_threads": 1}, "no key 'num_threads'"),
        ("runai_streamer", {"concurrency": "4"}, "concurrency must be of type int"),
        ("runai_streamer", {"memory_limit": 0}, "memory_limit must be at least 1"),
        ("tensorizer", {"tensorizer_uri": 3}, "tensorizer_uri must be of type str"),
        ("sharded_state", {"pattern": "x.safetensors"}, "must be a file's name with {rank} and {part}"),
    ],
)  # fmt: skip
def test_extra_settings_that_a_format_has_not(load_format: str, extra: dict, words: str) -> None:
    given = {"model": str(zoo.checkpoint("llama")), "load_format": load_format, "model_loader_extra_config": extra}
    with pytest.raises(ConfigError) as caught:
        resolve(given)
    assert words in str(caught.value) and "--model-loader-extra-config" in str(caught.value)
