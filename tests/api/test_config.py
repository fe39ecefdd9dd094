"""Resolution of the server's configuration: rules over several fields, the environment, model lookup."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fuseline.api import cli_tables as tables
from fuseline.api import config_check, config_levels, config_resolve
from fuseline.api.config import (
    ConfigError,
    Environment,
    ServerConfig,
    demo_dir,
    find_checkpoint,
    read_environment,
    variables_without_effect,
)
from fuseline.api.config_resolve import config_dict, resolve, without_effect
from fuseline.compile.config import PASSES, CompileConfig, GraphConfig
from fuseline.compile.passes import pipeline


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096}))
    return str(tmp_path)


BROKEN = {
    "below --max-num-seqs": {"max_num_batched_tokens": 100},
    "must fit one step": {"enable_chunked_prefill": False, "max_num_batched_tokens": 500, "max_model_len": 4000},
    "--chunked-prefill-size 64 needs": {"chunked_prefill_size": 64, "enable_chunked_prefill": False},
    "needs chunked prefill": {"max_num_partial_prefills": 2, "enable_chunked_prefill": False},
    "above --max-num-partial-prefills": {"max_long_partial_prefills": 2},
    "above --max-model-len": {"long_prefill_token_threshold": 4001, "max_model_len": 4000},
    "above the model's limit of 4096": {"max_model_len": 4097},
    "at most 65535": {"port": 65536},
    "--gpu-memory-utilization 1.5": {"gpu_memory_utilization": 1.5},
    "--gpu-memory-utilization 0": {"gpu_memory_utilization": 0},
    "--state-snapshot-share 1: must be at least 0 and below 1": {"state_snapshot_share": 1},
    "--state-snapshot-share -0.1": {"state_snapshot_share": -0.1},
    "--state-snapshot-share nan": {"state_snapshot_share": float("nan")},
    "--swap-space -1": {"swap_space": -1},
    "--swap-space 1000000000.0": {"swap_space": 1e9},
    "--max-num-seqs 0": {"max_num_seqs": 0},
    "--shutdown-timeout nan": {"shutdown_timeout": float("nan")},
    "no file /no/key": {"ssl_keyfile": "/no/key"},
    "needs --ssl-ca-certs": {"ssl_cert_reqs": 2},
    "neither a file nor a template": {"chat_template": "chatml"},
    "neither a file nor": {"chat_template": "x" * 5000},
    "needs --prompt-workers": {"trust_request_chat_template": True, "prompt_workers": 0},
    "no directory": {"generation_config": "/no/such"},
    "--metrics-prefix": {"metrics_prefix": "1 bad"},
    "--num-scheduler-steps 0: must be at least 1": {"num_scheduler_steps": 0},
    "choose from recompute, swap": {"preemption_mode": "hope"},
    "unknown setting 'colour'": {"colour": "red"},
    "unknown setting 'level'": {"level": 1},
    "no level 7": {"compilation_config": 7},
    "unknown key 'x'": {"compilation_config": {"x": 1}},
    "names of passes": {"compilation_config": {"pass_config": {"a": "off"}}},
    "pass_config: there is no pass 'a'": {"compilation_config": {"pass_config": {"a": False}}},
    "config: page_attention cannot be left out": {"compilation_config": {"pass_config": {"page_attention": False}}},
    "--disabled-passes: there is no pass 'fuse' (passes: absorb_latent,": {"disabled_passes": ("fuse",)},
    "--disabled-passes: page_attention cannot be left out": {"disabled_passes": ("page_attention",)},
    "--tensor-parallel-size: not yet supported": {"tensor_parallel_size": 2},
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
    config = resolve({"model": model, "compilation_config": 0, "hf_overrides": {"vocab_size": 1}, "api_key": "k",
                      "seed": None, "tensor_parallel_size": 1, "served_model_name": "x",
                      "additional_config": {}})  # fmt: skip
    assert config.engine.compile.level == 0 and config.engine.compile.hf_overrides == (("vocab_size", 1),)
    assert config.api_key == ("k",) and config.served_model_name == ("x",)
    assert hash(config) == hash(dataclasses.replace(config))


def test_shared_fields_reach_every_part(model: str) -> None:
    engine = resolve({"model": model, "block_size": 32, "max_num_seqs": 3, "seed": 5, "dtype": "half"}).engine
    assert engine.cache.block_size == engine.compile.block_size == 32
    assert engine.scheduler.max_num_seqs == engine.compile.max_num_seqs == 3
    assert engine.seed == engine.compile.seed == 5
    assert engine.scheduler.max_num_queued_reqs == 12
    assert engine.compile.dtype == "float16"


LEVEL_KEYS = {
    "level": ([0, 1, 2, 3], [4, -1, True, "2", 1.5, None]),
    "backend": (["inductor", "eager", None], ["openxla", 1]),
    "cache_dir": (["/c", None], [3]),
    "compile_sizes": ([[], None], [[1, 8], 8, ["8"], [0], [True], {}]),
    "cudagraph_capture_sizes": ([[1, 2, 4]], [[1.5], "all"]),
    "cudagraph_mode": (["NONE", "FULL_DECODE_ONLY", "FULL", None], ["PIECEWISE", 2]),
    "cudagraph_num_of_warmups": ([0, 3], [-1, "1", False]),
    "max_cudagraph_capture_size": ([8, None], [0, "8"]),
    "custom_ops": ([["none", "+rms_norm"], ["-linear"], ["all"], []], ["none", ["rms_norm"], ["+x"], ["all", "none"]]),
    "pass_config": ([{"fuse_act_mul": False, "join_linears": True}, {}], [["fuse_act_mul"], {"fuse_act_mul": 0}]),
    "splitting_ops": ([["aten.mm"]], ["aten.mm", [1]]),
    "use_inductor": ([True, False], [1, "no"]),
}
"""Key -> values that are taken, values that are refused."""


def test_every_key_of_compilation_config_is_here() -> None:
    assert set(LEVEL_KEYS) == set(config_levels.KEYS)


@pytest.mark.parametrize("key", LEVEL_KEYS)
def test_keys_of_compilation_config_are_checked(model: str, key: str) -> None:
    good, bad = LEVEL_KEYS[key]
    for value in good:
        assert dict(resolve({"model": model, "compilation_config": {key: value}}).compilation_config)[key] == value
    for value in bad:
        with pytest.raises(ConfigError, match=f"compilation_config: .*{key}") as error:
            resolve({"model": model, "compilation_config": {key: value}})
        assert "\n" not in str(error.value)


def test_keys_of_compilation_config_reach_the_compiler(model: str) -> None:
    def compiler(**levels):
        values = {"model": model, "compilation_config": levels, "disabled_passes": ["merge_equal"]}
        return resolve(values).engine.compile

    assert compiler(level=1).disabled_passes == ("merge_equal",)
    given = {"merge_equal": False, "find_rope": False, "find_norm": True}
    assert compiler(pass_config=given).disabled_passes == ("merge_equal", "find_rope")
    assert compiler(custom_ops=["-linear"]).disabled_passes == ("merge_equal", "pack_weights")
    assert compiler(custom_ops=["none", "+linear", "+fused_moe"]).disabled_passes == (
        "merge_equal", "find_norm", "find_rope", "fuse_act_mul",
    )  # fmt: skip
    assert compiler(cache_dir="/c").cache_dir == "/c"
    assert [compiler(level=2, **eager).level for eager in ({"backend": "eager"}, {"use_inductor": False})] == [1, 1]
    assert compiler(level=0, backend="eager").level == 0
    assert compiler(level=2, backend="inductor").level == 2


def test_enforce_eager_compiles_no_regions(model: str) -> None:
    config = resolve({"model": model, "enforce_eager": True})
    assert config.engine.compile.level == 1 and config.level_text == "1 (asked: 2)"
    assert resolve({"model": model, "enforce_eager": True, "compilation_config": 0}).engine.compile.level == 0


def test_the_names_of_passes_are_those_of_the_pipeline() -> None:
    asked = pipeline.stages(CompileConfig("", gives_hidden=True, takes_embeds=True))
    cpu, *others = (
        [graph_pass.__name__ for _, passes in stages for graph_pass in passes]
        for stages in (pipeline.COMPILED, pipeline.COMPILED_CUDA, pipeline.INVARIANT_CUDA, asked)
    )
    more = dict.fromkeys(name for names in others for name in names if name not in cpu)
    assert list(PASSES) == [*cpu, "cut_regions", *more]


def test_batch_invariance_can_be_asked_for_by_flag_or_variable(model: str) -> None:
    assert not resolve({"model": model}).engine.compile.batch_invariant
    assert resolve({"model": model, "batch_invariant": True}).engine.compile.batch_invariant
    asked = read_environment({"VLLM_BATCH_INVARIANT": "1"})
    assert resolve({"model": model}, asked).engine.compile.batch_invariant
    assert not resolve({"model": model, "batch_invariant": False}, asked).engine.compile.batch_invariant


def test_level_text_is_honest(model: str) -> None:
    assert resolve({"model": model, "compilation_config": 3}).level_text == "3"
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


def test_variables_without_effect_are_named() -> None:
    lines = variables_without_effect({"VLLM_IMAGE_FETCH_TIMEOUT": "5", "FUSELINE_API_KEY": "k", "FUSELINE_X": "1"})
    assert lines == ["VLLM_IMAGE_FETCH_TIMEOUT has no effect: media are not yet supported"]


def test_long_context_can_be_forced(model: str) -> None:
    config = resolve({"model": model, "max_model_len": 9000}, Environment(allow_long_max_model_len="1"))
    assert config.engine.compile.max_model_len == 9000
    assert dict(config.engine.compile.hf_overrides) == {"max_position_embeddings": 9000}


def test_unchunked_budget_grows_to_the_context(model: str) -> None:
    config = resolve({"model": model, "enable_chunked_prefill": False})
    assert config.engine.scheduler.max_num_batched_tokens == config.engine.compile.max_num_batched_tokens == 4096


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({}, 128),
        ({"max_num_batched_tokens": 3000}, 0),
        ({"max_num_batched_tokens": 3000, "chunked_prefill_size": 70}, 70),
        ({"chunked_prefill_size": 0}, 0),
        ({"enable_chunked_prefill": False}, 0),
    ],
)
def test_prompts_take_short_steps_on_a_cpu(model: str, given: dict, size: int) -> None:
    assert resolve({"model": model, "device": "cpu", **given}).engine.scheduler.chunked_prefill_size == size


def test_prompts_take_whole_steps_on_a_gpu(model: str, monkeypatch) -> None:
    for module in ("config_check", "config_resolve"):
        monkeypatch.setattr(f"fuseline.api.{module}.likely_kind", lambda device: "cuda")
    assert resolve({"model": model, "device": "cuda"}).engine.scheduler.chunked_prefill_size == 0


def test_lookup_of_models(tmp_path: Path, monkeypatch) -> None:
    assert find_checkpoint(str(tmp_path)) == str(tmp_path)
    file = tmp_path / "model.bin"
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
    other = "1" * 40
    (folder / "snapshots" / other).mkdir()
    (folder / "refs" / "v2").write_text(other)
    assert find_checkpoint("org/tiny", str(tmp_path), "v2") == str(folder / "snapshots" / other)
    assert find_checkpoint("org/tiny", str(tmp_path), other) == str(folder / "snapshots" / other)
    with pytest.raises(ConfigError, match="files of revision v3 are in"):
        find_checkpoint("org/tiny", str(tmp_path), "v3")
    for snapshot in (commit, other):
        config = {"model_type": "llama", "max_position_embeddings": 64 if snapshot == commit else 32}
        (folder / "snapshots" / snapshot / "config.json").write_text(json.dumps(config))
    given = {"model": "org/tiny", "download_dir": str(tmp_path)}
    assert resolve(given).engine.compile.max_model_len == 64
    newer = resolve({**given, "revision": "v2"})
    assert newer.engine.compile.max_model_len == 32 and newer.tokenizer_dir.endswith(other)
    mixed = resolve({**given, "revision": "v2", "tokenizer_revision": "main"})
    assert mixed.engine.compile.model.endswith(other) and mixed.tokenizer_dir.endswith(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_checkpoint("org/tiny") == str(folder / "snapshots" / commit)


def test_config_dict_is_json_with_every_field(model: str) -> None:
    config = resolve({"model": model, "additional_config": {"a": 1}, "api_key": "secret"})
    shown = json.loads(json.dumps(config_dict(config)))
    assert {item.name for item in dataclasses.fields(ServerConfig)} - {"engine", "recorded"} <= set(shown)
    assert shown["additional_config"] == {"a": 1} and shown["block_size"] == 16
    assert "secret" not in json.dumps(shown)
    assert "secret" not in repr(config)


def test_settings_of_graphs_reach_the_engine(model: str) -> None:
    levels = {"cudagraph_capture_sizes": [4, 1], "cudagraph_num_of_warmups": 3}
    given = {"model": model, "max_seq_len_to_capture": 100, "enforce_eager": True, "compilation_config": levels}
    assert resolve(given).engine.graphs == GraphConfig((4, 1), False, 100, 3)
    assert resolve({"model": model}).engine.graphs == GraphConfig()
    none = resolve({"model": model, "compilation_config": {"cudagraph_num_of_warmups": 0}})
    assert none.engine.graphs.num_warmups == 1, "a capture must not compile"


def test_a_gpu_takes_what_a_cpu_refuses(model: str, monkeypatch) -> None:
    given = {"model": model, "kv_cache_dtype": "fp8", "swap_space": 1.0, "max_seq_len_to_capture": 9,
             "preemption_mode": "swap", "cpu_offload_gb": 1.0, "calculate_kv_scales": True,
             "compilation_config": {"cudagraph_capture_sizes": [1]}}  # fmt: skip
    lines = without_effect(resolve({**given, "kv_cache_dtype": "auto"}))
    assert [line.split()[0] for line in lines] == [
        *("--" + name.replace("_", "-") for name in tables.GPU_ONLY), "--compilation-config:",
    ]  # fmt: skip
    for module in (config_check, config_resolve):
        monkeypatch.setattr(module, "likely_kind", lambda device: "cuda")
    config = resolve({**given, "device": "cuda"})
    assert config.engine.compile.kv_cache_dtype == "fp8" and config.engine.device == "cuda"
    assert without_effect(config) == []
    e5m2 = resolve({**given, "device": "cuda", "kv_cache_dtype": "fp8_e5m2"})
    assert e5m2.engine.compile.kv_cache_dtype == "fp8_e5m2"
    with pytest.raises(ConfigError, match="^--kv-cache-dtype int8 needs a CPU .--device cpu.; on a GPU use fp8$"):
        resolve({**given, "device": "cuda", "kv_cache_dtype": "int8"})
    with pytest.raises(ConfigError, match="Available devices: cuda, cpu.$"):
        resolve({**given, "device": "tpu"})


def test_flags_without_effect_are_named(model: str) -> None:
    assert without_effect(resolve({"model": model})) == []
    levels = {"splitting_ops": [], "compile_sizes": [], "custom_ops": ["all"], "cudagraph_capture_sizes": None}
    given = {"model": model, "disable_async_output_proc": True, "swap_space": 1.0, "compilation_config": levels}
    lines = without_effect(resolve(given))
    assert lines == [
        "--disable-async-output-proc has no effect: output is processed in another process",
        "--swap-space has no effect: on a CPU there is nothing to swap to",
        "--compilation-config: no effect on this device: splitting_ops",
    ]
