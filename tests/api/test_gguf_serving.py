"""`fuseline serve file.gguf` alone: weights, tokenizer, chat template and settings are the file's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf_files
import httpx
import pytest
from serve_cases import server

from fuseline.api.cli import main
from fuseline.api.config import ConfigError, demo_dir
from fuseline.api.config_resolve import resolve
from fuseline.api.prompt.encode import open_tokenizer

QUESTIONS = ("What is the capital of France?", "What is the capital of Italy?")
TEXTS = (
    "Hello, it's 1234 o'clock.", "  two  blanks\n\n", "<|im_start|>user\nname: é 中文 🦜<|im_end|>",
    "don't<think>x</think>",
)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.demo(tmp_path_factory.mktemp("gguf") / "demo.gguf", gguf_files.all_of("Q8_0"))


@pytest.fixture(scope="module")
def url(file: Path) -> Iterator[str]:
    with server(file.parent, str(file), "--skip-model-check") as (url, _):
        yield url


def test_it_chats_as_its_template_says(url: str, file: Path) -> None:
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == str(file)
    for question, answer in zip(QUESTIONS, ("Paris", "Rome"), strict=True):
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 40}
        choice = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
        assert answer in choice["message"]["content"] and choice["finish_reason"] == "stop"


def test_ids_are_those_of_the_original_tokenizer(file: Path) -> None:
    found, plain = (open_tokenizer(resolve({"model": str(model)})) for model in (file, demo_dir()))
    for text in TEXTS:
        ids = plain.encode(text, True)
        assert found.encode(text, True) == ids and found.decode(ids, False) == plain.decode(ids, False)
    assert found.chat_template == plain.chat_template and found.eos_id == plain.eos_id


def test_a_kind_of_tokenizer_that_is_not_known_is_refused(file: Path, tmp_path: Path) -> None:
    """It would part words where the model was not trained to."""
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes().replace(b"smollm", b"volapk"))
    with pytest.raises(ConfigError, match="tokenizer.ggml.pre 'volapk' is not known.; give one with --tokenizer"):
        open_tokenizer(resolve({"model": str(other)}))


def test_settings_are_those_of_the_file(file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["serve", str(file), "--print-config", "--load-format", "gguf", "--quantization", "gguf"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["max_model_len"] == 2048 and config["served_model_name"] == [str(file)]
    assert (config["load_format"], config["quantization"]) == ("gguf", "gguf")
    assert resolve({"model": str(file), "tokenizer": "demo"}).tokenizer == str(demo_dir())


@pytest.mark.parametrize(("change", "message"), [
    (lambda data: data[:-1000], "is cut off"),
    (lambda data: data[:5000], "cut off within its header"),
    (lambda data: b"PK" + data[2:], "is not a GGUF file"),
    (lambda data: data.replace(b"llama", b"whale"), "general.architecture 'whale' is not supported"),
    (lambda data: data.replace(b"blk.3.ffn_up", b"blk.9.ffn_up"), "model.layers.3.mlp.up_proj.weight"),
])  # fmt: skip
def test_a_damaged_file_is_one_line(change, message: str, file: Path, tmp_path: Path, capsys) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(change(file.read_bytes()))
    assert main(["serve", str(damaged), "--port", "0", "--disable-frontend-multiprocessing"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "damaged.gguf" in error and message in error and "Traceback" not in error
