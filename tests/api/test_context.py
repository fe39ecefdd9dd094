"""Context length from the files of a checkpoint, and the flags that change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fuseline.api.config import ConfigError, Environment
from fuseline.api.config_context import find_context
from fuseline.api.config_resolve import resolve

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}  # fmt: skip


def write(folder: Path, config: dict[str, Any], tokenizer: dict[str, Any] | None = None) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return str(folder)


def rope(length: float, **scaling: Any) -> dict[str, Any]:
    return {"max_position_embeddings": length, "rope_scaling": scaling}


STATED = {
    "n_positions": ({"n_positions": 1024}, 1024),
    "the smallest of several": ({"max_position_embeddings": 4096, "seq_length": 2048}, 2048),
    "Command-R's own key": ({"max_position_embeddings": 8192, "model_max_length": 131072}, 131072),
    "a model inside a model": ({"text_config": {"max_position_embeddings": 77}}, 77),
    "one in a part": ({"vision": {}, "thinker_config": {"text_config": {"max_position_embeddings": 78}}}, 78),
    "a float": ({"max_position_embeddings": 4096.0}, 4096),
    "an exponent": ({"max_position_embeddings": 1e5}, 100000),
    "null, text and true": ({"n_ctx": 50, "max_position_embeddings": None, "seq_len": "9", "seq_length": True}, 50),
    "nothing": ({}, 0),
    "Llama-3.2": ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072),
    "Llama-3.2, new spelling": ({"max_position_embeddings": 131072, "rope_parameters": LLAMA3}, 131072),
    "no scaling": ({"max_position_embeddings": 400, "rope_parameters": {"rope_type": "default"}}, 400),
    "linear": (rope(2048, type="linear", factor=4.0), 8192),
    "linear, whole number": (rope(2048, rope_type="linear", factor=4), 8192),
    "linear, a fraction": (rope(2048, rope_type="linear", factor=2.5), 5120),
    "dynamic": (rope(4096, type="dynamic", factor=2.0), 8192),
    "yarn of Qwen2.5": (rope(32768, type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),
    "yarn of DeepSeek": (rope(163840, type="yarn", factor=40, original_max_position_embeddings=4096), 163840),
    "yarn without the original": (rope(32768, rope_type="yarn", factor=4.0), 131072),
    "yarn, the original beside it": (
        {"original_max_position_embeddings": 50, **rope(100, rope_type="yarn", factor=4.0)}, 200),
    "keys that DeepSeek-V3.2 chooses": ({"index_topk": 2048, **rope(163840, type="yarn", factor=40)}, 2048),
    "more keys than there are": ({"keep_window_size": 2048, "max_position_embeddings": 1024}, 1024),
    "longrope of Phi-3": (rope(131072, type="longrope", factor=32.0), 131072),
    "su": (rope(131072, type="su", factor=32.0), 131072),
    "yarn that says less": (rope(100, rope_type="yarn", factor=2.0, original_max_position_embeddings=30), 60),
    "a factor of null": (rope(100, rope_type="linear", factor=None), 100),
    "rope of two layer types": (
        {"max_position_embeddings": 100, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0},
                                                             "sliding_attention": {"rope_type": "default"}}}, 800),
    "Gemma 3, scaled already": ({"model_type": "gemma3_text", **rope(131072, rope_type="linear", factor=8.0)}, 131072),
}  # fmt: skip


@pytest.mark.parametrize("name", STATED)
def test_the_context_is_what_config_json_means(tmp_path: Path, name: str) -> None:
    config, limit = STATED[name]
    assert find_context(write(tmp_path, config), {}).limit == limit


@pytest.mark.parametrize(
    ("config", "tokenizer", "limit"),
    [
        ({}, {"model_max_length": 777}, 777),
        ({}, {"model_max_length": 777.0}, 777),
        ({}, {"model_max_length": 1e30}, 0),
        ({"max_position_embeddings": 4096}, {"model_max_length": 777}, 4096),
        ({"model_type": "llama"}, {"model_max_length": 777}, 777),
        ({"model_type": "llama"}, {"model_max_length": 10**6}, 2048),  # no more than the type's default
        ({}, {}, 0),
    ],
)
def test_the_tokenizer_counts_where_the_config_is_silent(tmp_path: Path, config, tokenizer, limit: int) -> None:
    assert find_context(write(tmp_path, config, tokenizer), {}).limit == limit


def test_overrides_count(tmp_path: Path) -> None:
    model = write(tmp_path, {"text_config": rope(100, rope_type="linear", factor=2.0)})
    assert find_context(model, {}).limit == 200
    assert find_context(model, {"text_config": {"rope_scaling": {"factor": 3.0}}}).limit == 300
    assert find_context(model, {}, {"rope_type": "dynamic", "factor": 8.0}).limit == 800
    assert find_context(model, {"text_config": {"max_position_embeddings": 50}}).limit == 100


@pytest.fixture
def llama(tmp_path: Path) -> str:
    config = {"model_type": "llama", "max_position_embeddings": 4096, "sliding_window": 1024}
    return write(tmp_path, config)


@pytest.mark.parametrize(
    ("asked", "length", "fits"),
    [(None, 4096, False), (0, 4096, False), ("auto", 4096, True), (-1, 4096, True), ("-1", 4096, True),
     ("2k", 2000, False), ("2K", 2048, False), (1000, 1000, False)],
)  # fmt: skip
def test_forms_of_max_model_len(llama: str, asked: object, length: int, fits: bool) -> None:
    engine = resolve({"model": llama, "max_model_len": asked}).engine
    assert (engine.compile.max_model_len, engine.cache.fits_context) == (length, fits)


def test_the_window_can_end_the_context(llama: str) -> None:
    given = {"model": llama, "disable_sliding_window": True}
    assert resolve(given).engine.compile.max_model_len == 1024
    for environment in (Environment(), Environment(allow_long_max_model_len="1")):
        with pytest.raises(ConfigError, match="limit of 1024"):
            resolve({**given, "max_model_len": 1025}, environment)


def test_a_longer_context_can_be_forced_inside_a_model_too(tmp_path: Path) -> None:
    allowed = Environment(allow_long_max_model_len="1")
    given = {"model": write(tmp_path, {"model_type": "gemma3", "text_config": {"max_position_embeddings": 100}}),
             "max_model_len": 200}  # fmt: skip
    overrides = dict(resolve(given, allowed).engine.compile.hf_overrides)
    assert overrides == {"text_config": {"max_position_embeddings": 200}}


def test_scaling_raises_the_limit(llama: str) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    config = resolve({"model": llama, "rope_scaling": scaling, "max_model_len": 16000})
    assert config.engine.compile.max_model_len == 16000 and dict(config.engine.compile.rope_scaling) == scaling
    with pytest.raises(ConfigError, match="limit of 16384"):
        resolve({"model": llama, "rope_scaling": scaling, "max_model_len": 16385})
