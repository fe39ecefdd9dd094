"""Keys of JSON flags given one at a time, other names of flags, and text given from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fuseline.api.cli_dotted import fold_dotted
from fuseline.api.config import ConfigError
from fuseline.api.config_resolve import config_dict, resolve, without_effect


@pytest.mark.parametrize(
    ("arguments", "folded"),
    [
        (["-O.level=1"], ["-O", '{"level": 1}']),
        (["-cc.pass_config.fuse-act-mul", "false"], ["-cc", '{"pass_config": {"fuse_act_mul": false}}']),
        (["--hf-overrides.a.b=x", "--port", "1"], ["--hf-overrides", '{"a": {"b": "x"}}', "--port", "1"]),
        (["--hf-overrides.a+=1,x"], ["--hf-overrides", '{"a": [1, "x"]}']),
        (["--hf-overrides.a=True"], ["--hf-overrides", '{"a": true}']),
        (["--hf-overrides.a"], ["--hf-overrides", '{"a": true}']),
        (["--hf-overrides.a=[1, 2]"], ["--hf-overrides", '{"a": [1, 2]}']),
        (["--port.x=1", "-0.5", "a.b", "--chat-template=./x.jinja"],) * 2,
    ],
)
def test_dotted_keys_become_objects(arguments: list[str], folded: list[str]) -> None:
    assert fold_dotted(arguments) == folded


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096}))
    return str(tmp_path)


def test_other_names_reach_the_setting(model: str) -> None:
    def resolved(**values: object):
        return resolve({"model": model, **values})

    assert resolved(enable_log_requests=True).disable_log_requests is False
    assert resolved(enable_log_requests=False).disable_log_requests is True
    assert resolved(tokenizer_pool_size=3).prompt_workers == 3 and resolved(tokenizer_pool_size=0).prompt_workers == 2
    assert resolved(optimization_level=1).asked_level == 1
    levels = dict(resolved(cudagraph_capture_sizes=["8", "2"], max_cudagraph_capture_size=4).compilation_config)
    assert levels == {"level": 2, "cudagraph_capture_sizes": [8, 2], "max_cudagraph_capture_size": 4}
    graphs = resolved(cuda_graph_sizes=["8", "2"], compilation_config={"max_cudagraph_capture_size": 4}).engine.graphs
    assert graphs.resolved(16) == (2,)
    assert resolved(compilation_config={"cudagraph_mode": "NONE"}).engine.graphs.enabled is False
    assert resolved(compilation_config={"cudagraph_mode": "FULL_DECODE_ONLY"}).engine.graphs.resolved_mixed(99) == ()
    assert resolved().engine.graphs.resolved_whole_mixed(99) == ()
    whole = resolved(compilation_config={"cudagraph_mode": "FULL"}).engine.graphs
    assert whole.resolved_whole_mixed(32) == whole.resolved_mixed(32) == (16, 32)
    for own, paths in ({}, "/health,/metrics"), ({"disable_access_log_for_endpoints": "/a"}, "/a,/health,/metrics"):
        found = resolved(disable_uvicorn_metrics_access_log=True, **own)
        assert found.disable_access_log_for_endpoints == paths
    log = Path(model) / "log.json"
    log.write_text("{}")
    assert resolved(log_config_file=str(log)).logging_config_path == str(log)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"enable_log_requests": True, "disable_log_requests": True}, "contradicts --disable-log-requests"),
        ({"tokenizer_pool_size": 3, "prompt_workers": 2}, "contradicts --prompt-workers"),
        ({"cudagraph_capture_sizes": ["x"]}, "'x' is no whole number"),
        ({"compilation_config": {"mode": 1, "level": 2}}, "give one"),
        ({"compilation_config": {"mode": "SLOW"}}, "no level 'SLOW'"),
        ({"max_model_len": "x"}, "--max-model-len: 'x' is no whole number"),
        ({"hf_overrides": "[1]"}, "--hf-overrides: '[1]' is no JSON object"),
        ({"dtype": "int3"}, "--dtype: invalid choice"),
        ({"max_lora_rank": 7}, "--max-lora-rank 7: choose from"),
    ],
)
def test_contradictions_and_bad_values_are_one_line(model: str, values: dict, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve({"model": model, **values})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_text_from_python_is_what_it_is_on_the_command_line(model: str) -> None:
    config = resolve({"model": model, "max_model_len": "2k", "hf_overrides": '{"vocab_size": 9}', "port": "8001",
                      "middleware": "a.b", "compilation_config": "3"})  # fmt: skip
    assert (config.engine.compile.max_model_len, config.port, config.asked_level) == (2000, 8001, 3)
    assert dict(config.engine.compile.hf_overrides) == {"vocab_size": 9} and config.middleware == ("a.b",)


def test_what_has_no_effect_is_told(model: str) -> None:
    given = {"attention_backend": "FLASH_ATTN", "revision": "main", "runner": "generate", "additional_config": {"a": 1},
             "data_parallel_size": 1, "tokenizer_mode": "slow", "enable_log_requests": True}  # fmt: skip
    lines = without_effect(resolve({"model": model, **given}))
    assert [line.split()[0] for line in lines] == [
        "--tokenizer-mode", "--additional-config", "--attention-backend", "--revision",
    ]  # fmt: skip


def test_secrets_are_hidden(model: str) -> None:
    config = resolve({"model": model, "hf_token": "hf_xyzzy", "api_key": "k_xyzzy"})
    shown = config_dict(config)
    assert "xyzzy" not in repr(config) + repr(without_effect(config))
    assert shown["hf_token"] == shown["api_key"] == "***" and "xyzzy" not in json.dumps(shown)
