"""The command line: rules of SPEC 20.1, the YAML file of SPEC 21, help, exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fuseline.api import cli_tables as tables
from fuseline.api.cli import main
from fuseline.api.cli_flags import config_flags, row_flags
from fuseline.api.config_refusals import RULES


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096}))
    return str(folder)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch) -> None:
    for name in ("FUSELINE_API_KEY", "VLLM_API_KEY", "FUSELINE_LOGGING_LEVEL", "FUSELINE_CACHE_ROOT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def resolved(model: str, capsys):
    """Runs `serve MODEL ... --print-config` and returns the printed configuration."""

    def run(*arguments: str) -> dict:
        assert main(["serve", model, *arguments, "--print-config"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refusal(model: str, capsys):
    """Runs `serve MODEL ...` that must be refused; returns (exit status, last line of stderr)."""

    def run(*arguments: str, positional: bool = True) -> tuple[int, str]:
        try:
            status = main(["serve", *([model] if positional else []), *arguments, "--print-config"])
        except SystemExit as exit_:
            status = exit_.code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        return status, captured.err.splitlines()[-1]

    return run


def test_defaults(resolved, model: str) -> None:
    config = resolved()
    assert (config["host"], config["port"]) == ("127.0.0.1", 8000)
    assert config["model"] == model and config["served_model_name"] == [model]
    assert config["compilation_config"] == {"level": 2} and config["level"] == 2
    assert config["enable_prefix_caching"] and config["enable_chunked_prefill"]
    assert config["max_num_queued_reqs"] == 4 * 256
    assert config["api_key"] is None


@pytest.mark.parametrize("arguments", [["-O3"], ["-O", "3"], ["--compilation-config", "3"], ["--compilation_config=3"]])
def test_levels_are_spelled_in_many_ways(resolved, arguments: list[str]) -> None:
    assert resolved(*arguments)["compilation_config"] == {"level": 3}


def test_level_objects(resolved, refusal) -> None:
    config = resolved("-O", '{"level": 1, "pass_config": {"fuse_act_mul": false}, "cache_dir": "/c"}')
    assert config["level"] == 1 and config["disabled_passes"] == ["fuse_act_mul"] and config["cache_dir"] == "/c"
    assert resolved("-O0")["level"] == 0
    assert refusal("-O4")[0] == 2 and "levels: 0, 1, 2, 3" in refusal("-O4")[1]
    assert "unknown key 'colour'" in refusal("-O", '{"colour": 1}')[1]


@pytest.mark.parametrize("spelled", ["--max-num-seqs=7", "--max_num_seqs=7"])
def test_underscores_and_dashes_are_the_same(resolved, spelled: str) -> None:
    assert resolved(spelled)["max_num_seqs"] == 7


def test_values_keep_their_underscores(resolved) -> None:
    assert resolved("--served_model_name", "my_model", "other_one")["served_model_name"] == ["my_model", "other_one"]
    assert resolved("--served-model-name=my_model")["served_model_name"] == ["my_model"]


def test_booleans(resolved, refusal) -> None:
    assert resolved("--no-enable-prefix-caching")["enable_prefix_caching"] is False
    assert resolved("--enable-chunked-prefill")["enable_chunked_prefill"] is True
    assert resolved("--enable-chunked-prefill=False")["enable_chunked_prefill"] is False
    assert resolved("--enable-chunked-prefill", "FALSE")["enable_chunked_prefill"] is False
    assert refusal("--enable-chunked-prefill=maybe")[0] == 2
    assert resolved("--allow-credentials")["allow_credentials"] is True


def test_json_values(resolved, refusal) -> None:
    assert resolved("--allowed-origins", '["https://a"]')["allowed_origins"] == ["https://a"]
    assert resolved("--hf-overrides", '{"model_type": "llama"}')["hf_overrides"] == {"model_type": "llama"}
    assert refusal("--allowed-origins", "nope")[0] == 2
    assert refusal("--allowed-origins", '{"a": 1}')[0] == 2
    assert refusal("--hf-overrides", "[1]")[0] == 2


def test_human_numbers(resolved, refusal) -> None:
    assert resolved("--max-model-len", "2k")["max_model_len"] == 2000
    assert resolved("--max-model-len", "2K")["max_model_len"] == 2048
    assert resolved("--kv-cache-memory-bytes", "1.5G")["kv_cache_memory_bytes"] == 3 * 2**29
    for bad in ("2x", "", "k", "infk", "nank", "1.5"):
        assert refusal("--max-model-len", bad)[0] == 2


def test_none_and_empty_mean_unset(resolved) -> None:
    assert resolved("--host", "None")["host"] == "127.0.0.1"
    assert resolved("--response-role", "")["response_role"] == "assistant"


def test_dtype_aliases(resolved) -> None:
    assert resolved("--dtype", "half")["dtype"] == "float16"
    assert resolved("--dtype", "float")["dtype"] == "float32"


@pytest.mark.parametrize(
    "arguments",
    [["--port", "x"], ["--dtype", "int3"], ["--no-such-flag"], ["--por", "1"], ["--block-size", "7"], ["--port"]],
)
def test_usage_errors_exit_2(refusal, arguments: list[str]) -> None:
    status, line = refusal(*arguments)
    assert status == 2
    assert line.startswith("fuseline serve: error: ")


def test_unknown_flags_get_a_suggestion(refusal) -> None:
    assert refusal("--max-num-seq", "3")[1].endswith("(did you mean --max-num-seqs?)")
    assert "did you mean" not in refusal("--zzzz")[1]


LATER = sorted(name for name, row in tables.ROWS.items() if row.fate == "unimplemented")
VALUES = {
    "int": "7", "float": "7.5", "str": "something", "many": "x", "json": '{"a": 1}', "pairs": "image=3",
    "floats": "1,2", "bool-value": "false",
}  # fmt: skip
"""A value of each kind that is nobody's default."""


def other_value(name: str) -> list[str]:
    """Arguments that give the flag a value other than its default."""
    row = tables.ROWS[name]
    if row.kind == "bool":
        return ["--" + name.replace("_", "-")]
    choices = [str(choice) for choice in row.choices if not row.changes_nothing(choice)]
    return ["--" + name.replace("_", "-"), choices[-1] if choices else VALUES[row.kind]]


@pytest.mark.parametrize("name", LATER)
def test_flags_of_later_parts_are_refused_in_words(refusal, name: str) -> None:
    status, line = refusal(*other_value(name))
    assert status == 1
    option = "--" + name.replace("_", "-")
    if name in RULES:
        assert line.startswith(f"fuseline: error: {option}")
    else:
        assert line == f"fuseline: error: {option}: not yet supported ({tables.ROWS[name].note}); leave it out"


def test_neutral_values_of_later_flags_are_accepted(resolved) -> None:
    config = resolved("-tp", "1", "--pipeline-parallel-size=1", "--no-enable-lora", "--quantization", "None")
    assert config["tensor_parallel_size"] == 1 and config["enable_lora"] is False and config["quantization"] is None


@pytest.mark.parametrize(
    ("name", "choice"), [(name, choice) for name, rows in tables.LATER_CHOICES.items() for choice in rows]
)
def test_choices_of_later_parts_are_refused_in_words(refusal, name: str, choice: str) -> None:
    status, line = refusal("--" + name.replace("_", "-"), choice)
    assert status == 1 and ": not yet supported; " in line


@pytest.mark.parametrize("device", sorted(tables.MISSING_DEVICES))
def test_missing_devices_are_named_before_the_model_is_looked_up(refusal, device: str) -> None:
    status, line = refusal("/no/such/model", "--device", device, positional=False)
    assert status == 1
    assert line.startswith(f"fuseline: error: --device {device}: ") and line.endswith("Available devices: cpu.")


@pytest.mark.parametrize("name", sorted(tables.ROWS))
def test_flags_without_a_field_accept_their_default(resolved, name: str) -> None:
    flag = row_flags()[name]
    if flag.kind == "bool":
        value = [flag.option if flag.default else f"--no-{flag.option[2:]}"]
    elif flag.kind in ("many", "floats"):
        value = []
    elif flag.kind in ("json", "pairs"):
        value = [flag.option, "{}"]
    else:
        value = [flag.option, str(flag.default).lower() if flag.kind == "bool-value" else str(flag.default)]
    if flag.default is None and flag.kind in ("int", "float"):
        value = []
    shown = resolved(*value)[name]
    expected = {"json": {}, "pairs": {}, "many": [], "floats": []}.get(flag.kind, flag.default)
    assert shown == expected


@pytest.mark.parametrize("name", sorted(name for name, flag in config_flags().items() if flag.choices))
def test_every_choice_is_accepted_or_refused_in_words(name: str, model: str, capsys) -> None:
    for choice in config_flags()[name].choices:
        # --ssl-cert-reqs above 0 is refused for want of --ssl-ca-certs, in words as well
        status = main(["serve", model, config_flags()[name].option, str(choice), "--print-config"])
        captured = capsys.readouterr()
        assert status == 0 or (status == 1 and captured.err.count("\n") == 1)
        assert status == 1 or json.loads(captured.out)[name] is not None


def test_positional_model_wins(resolved, model: str) -> None:
    assert resolved("--model", "/nowhere")["model"] == model


def test_api_keys_are_hidden_and_swallow_no_model(model: str, capsys, monkeypatch) -> None:
    assert main(["serve", "--api-key", "secret1", "--api-key", "secret2", model, "--print-config"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["api_key"] == "***" and "secret" not in out
    monkeypatch.setenv("FUSELINE_API_KEY", "from-environment")
    assert main(["serve", model, "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["api_key"] == "***"


def write(tmp_path: Path, text: str, name: str = "c.yaml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_file_is_below_the_command_line(resolved, tmp_path: Path) -> None:
    file = write(tmp_path, "port: 6379\nuvicorn-log-level: warning\nmax_num_seqs: 9\n")
    assert resolved("--config", file, "--port", "7000")["port"] == 7000
    config = resolved("--config", file)
    assert (config["port"], config["uvicorn_log_level"], config["max_num_seqs"]) == (6379, "warning", 9)


def test_file_values_of_every_kind(resolved, tmp_path: Path) -> None:
    text = """
allow-credentials: true
skip-tokenizer-init: false
enable-prefix-caching: false
enable-chunked-prefill: false
max-num-batched-tokens: 8192
served-model-name: [a, b]
api-key: [k1, k2]
allowed-origins: ["https://x"]
hf-overrides: {max_position_embeddings: 5000}
compilation-config: {level: 1}
swap-space: null
"""
    config = resolved("--config", write(tmp_path, text, "c.yml"))
    assert config["allow_credentials"] and not config["skip_tokenizer_init"]
    assert not config["enable_prefix_caching"] and not config["enable_chunked_prefill"]
    assert config["served_model_name"] == ["a", "b"] and config["allowed_origins"] == ["https://x"]
    assert config["hf_overrides"] == {"max_position_embeddings": 5000} and config["compilation_config"] == {"level": 1}
    assert config["api_key"] == "***"


def test_command_line_replaces_lists_of_the_file(resolved, tmp_path: Path) -> None:
    file = write(tmp_path, "served_model_name: [a, b]\n")
    assert resolved("--config", file, "--served-model-name", "c")["served_model_name"] == ["c"]


def test_model_from_the_file(model: str, tmp_path: Path, capsys) -> None:
    assert main(["serve", "--config", write(tmp_path, f"model: {model}\n"), "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == model


def test_bad_files(refusal, tmp_path: Path) -> None:
    good = write(tmp_path, "port: 1\n")
    assert refusal("--config", write(tmp_path, "nonsense: 1\n"))[0] == 2
    assert refusal("--config", write(tmp_path, "port: x\n"))[0] == 2
    assert refusal("--config", write(tmp_path, f"config: {good}\n", "n.yaml"))[0] == 2
    for file, words in [
        (write(tmp_path, "port: 1\n", "c.json"), ".yaml or .yml"),
        (str(tmp_path / "absent.yaml"), "there is no file"),
        (write(tmp_path, "- a\n", "list.yaml"), "one mapping"),
        (write(tmp_path, "a: [\n", "open.yaml"), "cannot be read"),
    ]:
        status, line = refusal("--config", file)
        assert status == 1 and words in line
    status, line = refusal("--config", good, "--config", good)
    assert status == 1 and "more than once" in line


def test_help_is_grouped(capsys) -> None:
    for arguments, words in [
        (["--help"], ["serve", "run", "bench", "explain", "version"]),
        (["serve", "--help"], [*tables.GROUPS, "--print-config", "-O", "LEVEL|JSON"]),
        (["bench", "serve", "--help"], ["--request-rate", "--max-concurrency"]),
        (["run", "--help"], ["--url", "--system"]),
        (["explain", "--help"], ["--disabled-passes"]),
    ]:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words), arguments


@pytest.mark.parametrize(
    ("word", "shown", "hidden"),
    [("max-num-s", "--max-num-seqs", "--port"), ("Server", "--port", "--max-num-seqs"), ("all", "--port", "zzz"),
     ("max_num_seqs", "--max-num-seqs", "--port"), ("zzz", "no flag and no group", "--port")],
)  # fmt: skip
def test_help_of_a_word(word: str, shown: str, hidden: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["serve", f"--help={word}"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and shown in out and (hidden not in out or word == hidden)


def test_every_flag_has_help_and_one_group() -> None:
    grouped = [name for names in tables.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(config_flags())
    assert all(flag.help for flag in config_flags().values())
    assert not set(grouped) & set(tables.ROWS)


def test_version_and_unknown_commands(capsys) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2
    for arguments in ([], ["serv"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2


def test_module_is_the_console_script(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fuseline.api", "serve", "--device", "tpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("fuseline: error: --device tpu: ") and done.stderr.count("\n") == 1
