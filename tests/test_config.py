"""Resolution of the server's configuration: rules over several fields, the environment, model lookup."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fuseline.api.config import ConfigError, Environment, ServerConfig, demo_dir, find_checkpoint, read_environment
from fuseline.api.config_resolve import config_dict, context_limit, resolve, without_effect


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096}))
    return str(tmp_path)


BROKEN = {
    "below --max-num-seqs": {"max_num_batched_tokens": 100},
    "must fit one step": {"enable_chunked_prefill": False, "max_num_batched_tokens": 500, "max_model_len": 4000},
    "needs chunked prefill": {"max_num_partial_prefills": 2, "enable_chunked_prefill": False},
    "above --max-num-partial-prefills": {"max_long_partial_prefills": 2},
    "above --max-model-len": {"long_prefill_token_threshold": 4001, "max_model_len": 4000},
    "above the model's limit of 4096": {"max_model_len": 4097},
    "at most 65535": {"port": 65536},
    "--gpu-memory-utilization 1.5": {"gpu_memory_utilization": 1.5},
    "--gpu-memory-utilization 0": {"gpu_memory_utilization": 0},
    "--swap-space -1": {"swap_space": -1},
    "--swap-space 1000000000.0": {"swap_space": 1e9},
    "--max-num-seqs 0": {"max_num_seqs": 0},
    "--shutdown-timeout nan": {"shutdown_timeout": float("nan")},
    "no file /no/key": {"ssl_keyfile": "/no/key"},
    "needs --ssl-ca-certs": {"ssl_cert_reqs": 2},
    "neither a file nor a template": {"chat_template": "chatml"},
    "neither a file nor": {"chat_template": "x" * 5000},
    "no directory": {"generation_config": "/no/such"},
    "--metrics-prefix": {"metrics_prefix": "1 bad"},
    "--num-scheduler-steps 0: must be at least 1": {"num_scheduler_steps": 0},
    "choose from recompute, swap": {"preemption_mode": "hope"},
    "unknown setting 'colour'": {"colour": "red"},
    "unknown setting 'level'": {"level": 1},
    "no level 7": {"compilation_config": 7},
    "unknown key 'x'": {"compilation_config": {"x": 1}},
    "names of passes": {"compilation_config": {"pass_config": {"a": "off"}}},
    "tensor-parallel-size is not supported yet": {"tensor_parallel_size": 2},
}


@pytest.mark.parametrize("words", BROKEN)
def test_broken_rules_are_one_line(model: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve({"model": model, **BROKEN[words]})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_half_a_tls_pair_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="both"):
        resolve({"model": model, "ssl_keyfile": f"{model}/config.json"})


def test_python_values_are_taken_like_flags(model: str) -> None:
    config = resolve({"model": model, "compilation_config": 0, "hf_overrides": {"a": 1}, "api_key": "k", "seed": None,
                      "tensor_parallel_size": 1, "served_model_name": "x", "additional_config": {}})  # fmt: skip
    assert config.engine.compile.level == 0 and config.engine.compile.hf_overrides == (("a", 1),)
    assert config.api_key == ("k",) and config.served_model_name == ("x",)
    assert hash(config) == hash(dataclasses.replace(config))


def test_shared_fields_reach_every_part(model: str) -> None:
    engine = resolve({"model": model, "block_size": 32, "max_num_seqs": 3, "seed": 5, "dtype": "half"}).engine
    assert engine.cache.block_size == engine.compile.block_size == 32
    assert engine.scheduler.max_num_seqs == engine.compile.max_num_seqs == 3
    assert engine.seed == engine.compile.seed == 5
    assert engine.scheduler.max_num_queued_reqs == 12
    assert engine.compile.dtype == "float16"


def test_level_text_is_honest(model: str) -> None:
    assert resolve({"model": model, "compilation_config": 3}).level_text == "2 (asked: 3)"
    assert resolve({"model": model, "compilation_config": 1}).level_text == "1"


def test_environment_is_below_flags(model: str) -> None:
    environment = read_environment({
        "FUSELINE_API_KEY": "ours", "VLLM_API_KEY": "theirs", "VLLM_CPU_KVCACHE_SPACE": "0.5",
        "FUSELINE_SERVER_DEV_MODE": "1", "FUSELINE_CACHE_ROOT": "/c", "FUSELINE_LOGGING_LEVEL": "debug",
    })  # fmt: skip
    config = resolve({"model": model}, environment)
    assert config.api_key == ("ours",) and config.dev_mode and config.logging_level == "DEBUG"
    assert config.engine.cache.kv_cache_memory_bytes == 2**29 and config.engine.compile.cache_dir == "/c"
    given = resolve({"model": model, "api_key": ("flag",), "kv_cache_memory_bytes": 7, "cache_dir": "/d"}, environment)
    assert given.api_key == ("flag",) and given.engine.cache.kv_cache_memory_bytes == 7
    assert given.engine.compile.cache_dir == "/d"


@pytest.mark.parametrize("bad", [Environment(cpu_kvcache_space="lots"), Environment(logging_level="LOUD")])
def test_bad_environment_is_refused(model: str, bad: Environment) -> None:
    with pytest.raises(ConfigError, match="FUSELINE_"):
        resolve({"model": model}, bad)


def test_long_context_can_be_forced(model: str) -> None:
    config = resolve({"model": model, "max_model_len": 9000}, Environment(allow_long_max_model_len="1"))
    assert config.engine.compile.max_model_len == 9000
    assert dict(config.engine.compile.hf_overrides) == {"max_position_embeddings": 9000}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 77}}, 77),
        ({"n_ctx": 100, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 50}}, 200),
        ({"max_position_embeddings": 400, "rope_parameters": {"rope_type": "default"}}, 400),
        ({}, 0),
    ],
)
def test_context_limit(tmp_path: Path, config: dict, limit: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_limit(str(tmp_path), {})[0] == limit


def test_unchunked_budget_grows_to_the_context(model: str) -> None:
    config = resolve({"model": model, "enable_chunked_prefill": False})
    assert config.engine.scheduler.max_num_batched_tokens == config.engine.compile.max_num_batched_tokens == 4096


def test_lookup_of_models(tmp_path: Path, monkeypatch) -> None:
    assert find_checkpoint(str(tmp_path)) == str(tmp_path)
    file = tmp_path / "model.gguf"
    file.touch()
    for bad, words in [("no/such-model", "hub id"), (str(file), "is a file"), (str(tmp_path / "no"), "neither")]:
        with pytest.raises(ConfigError, match=words):
            find_checkpoint(bad)
    with pytest.raises(ConfigError, match="no config.json"):
        resolve({"model": str(tmp_path)})
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="no JSON object"):
        resolve({"model": str(tmp_path)})
    with pytest.raises(ConfigError, match="neither"):
        find_checkpoint("x" * 5000)
    assert demo_dir().name == "demo"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert find_checkpoint("demo") == str(tmp_path / "demo")


def test_cached_snapshots_are_found_by_hub_id(tmp_path: Path, monkeypatch) -> None:
    commit = "0" * 40
    folder = tmp_path / "models--org--tiny"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_checkpoint("org/tiny") == str(folder / "snapshots" / commit)


def test_config_dict_is_json_with_every_field(model: str) -> None:
    config = resolve({"model": model, "additional_config": {"a": 1}, "api_key": "secret"})
    shown = json.loads(json.dumps(config_dict(config)))
    assert {item.name for item in dataclasses.fields(ServerConfig)} - {"engine", "recorded"} <= set(shown)
    assert shown["additional_config"] == {"a": 1} and shown["block_size"] == 16
    assert "secret" not in json.dumps(shown)
    assert "secret" not in repr(config)


def test_flags_without_effect_are_named(model: str) -> None:
    assert without_effect(resolve({"model": model})) == []
    given = {"model": model, "enforce_eager": True, "swap_space": 1.0, "compilation_config": {"backend": "x"}}
    lines = without_effect(resolve(given))
    assert lines == [
        "--enforce-eager has no effect: no device graphs are captured on a CPU",
        "--swap-space has no effect: on a CPU there is nothing to swap to",
        "--compilation-config: backend have no effect at level 2",
    ]
