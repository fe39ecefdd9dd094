"""--hf-config-path: config.json and generation_config.json of another directory than the weights'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import zoo
from paged_driver import greedy

from fuseline.api.config import ConfigError
from fuseline.api.config_resolve import config_dict, resolve
from fuseline.api.served import generation_defaults
from fuseline.api.start_check import try_start
from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.capture.hf_model import load_config
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target

PROMPTS = zoo.make_prompts([3, 20])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """(weights alone, config alone): the first has a config.json of another model."""
    weights, config = tmp_path / "weights", tmp_path / "config"
    shutil.copytree(zoo.checkpoint("llama"), weights)
    config.mkdir()
    shutil.move(weights / "config.json", config)
    return weights, config


@pytest.mark.parametrize("has_own", [False, True])
def test_the_model_is_that_of_the_other_config(folders: tuple[Path, Path], tmp_path: Path, has_own: bool) -> None:
    weights, config = folders
    if has_own:
        (weights / "config.json").write_text('{"model_type": "gpt2"}')
    (config / "generation_config.json").write_text('{"eos_token_id": [5, 7], "temperature": 0.25}')
    given = {"model": str(weights), "hf_config_path": str(config), "cache_dir": str(tmp_path)}
    resolved = resolve({**given, "generation_config": "auto"})
    assert (resolved.engine.compile.max_model_len, config_dict(resolved)["hf_config_path"]) == (256, str(config))
    assert generation_defaults(resolved) == {"temperature": 0.25}
    try_start(resolve({**given, "skip_tokenizer_init": True}))
    model = compile_model(CompileConfig(**given, skip_model_check=True, dtype="float32"), detect_target())
    assert greedy(model, PROMPTS, 8) == zoo.truth(zoo.checkpoint("llama"), PROMPTS, 8)
    assert model.info.eos_token_ids == (5, 7)


def test_another_config_makes_another_graph(folders: tuple[Path, Path], tmp_path: Path) -> None:
    weights, config = folders
    values = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 0.5, "max_position_embeddings": 99}))
    shutil.copy(zoo.checkpoint("llama") / "config.json", weights)
    own, other = CompileConfig(str(weights)), CompileConfig(str(weights), hf_config_path=str(config))
    assert [load_config(one).rms_norm_eps for one in (own, other)] == [1e-6, 0.5]
    texts = []
    for settings in (own, other):
        model = compile_model(
            CompileConfig(settings.model, hf_config_path=settings.hf_config_path, cache_dir=str(tmp_path / "cache"),
                          skip_model_check=True), detect_target()
        )  # fmt: skip
        texts.append((greedy(model, PROMPTS, 8), model.info.max_model_len))
    assert texts[0][0] != texts[1][0] and [length for _, length in texts] == [256, 99]


def test_what_is_not_there_is_told(folders: tuple[Path, Path]) -> None:
    weights, config = folders
    with pytest.raises(ConfigError, match="--hf-config-path: model 'no/such' is neither a directory"):
        resolve({"model": str(weights), "hf_config_path": "no/such"})
    (config / "config.json").unlink()
    with pytest.raises(ConfigError, match=f"{config} has no config.json"):
        resolve({"model": str(weights), "hf_config_path": str(config)})
    with pytest.raises(CaptureError, match=f"{config} has no config.json"):
        load_config(CompileConfig(str(weights), hf_config_path=str(config)))


def test_a_cached_hub_id(folders: tuple[Path, Path], tmp_path: Path) -> None:
    weights, config = folders
    repo = tmp_path / "hub" / "models--me--llama"
    shutil.copytree(config, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    found = resolve({"model": str(weights), "hf_config_path": "me/llama", "download_dir": str(tmp_path / "hub")})
    assert Path(found.engine.compile.config_dir) == (repo / "snapshots" / "abc").resolve()
