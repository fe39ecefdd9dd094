"""The tokenizer is the one that AutoTokenizer loads from the same files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizer_kinds import CHATML, CHECKPOINTS, TEXTS, byte_level_bpe, save, write_json

from fuseline.api.config import ConfigError
from fuseline.api.prompt import tokenizer_files
from fuseline.api.prompt.auto_tokenizer import describe, load
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.tokenizer_files import read_tokenizer

Pair = tuple[TextTokenizer, Any]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Ours and that of Transformers, by what the checkpoint stores."""
    from transformers import AutoTokenizer

    made: dict[str, Pair] = {}

    def find(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            CHECKPOINTS[name](folder)
            ours = TextTokenizer(describe(load(str(folder), False)))
            made[name] = ours, AutoTokenizer.from_pretrained(folder)
        return made[name]

    return find


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_ids_and_text_are_those_of_auto_tokenizer(pair: Callable[[str], Pair], name: str) -> None:
    ours, theirs = pair(name)
    for text in [*TEXTS, " ".join(TEXTS) * 200]:
        for adds in (False, True):
            ids = ours.encode(text, adds)
            assert ids == theirs(text, add_special_tokens=adds)["input_ids"], text
            for skips in (False, True):
                assert ours.decode(ids, skips) == theirs.decode(ids, skip_special_tokens=skips), text


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_special_tokens_are_those_of_auto_tokenizer(pair: Callable[[str], Pair], name: str) -> None:
    ours, theirs = pair(name)
    assert ours.special_tokens == theirs.special_tokens_map and ours.eos_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    assert set(ours.added_tokens) == set(theirs.added_tokens_encoder)


def test_what_the_files_say(pair: Callable[[str], Pair]) -> None:
    """Without Transformers as a witness: the faults that a tokenizer.json alone leads to."""
    assert len(pair("truncation and padding")[0].encode(TEXTS[0] * 9, False)) > 12
    assert len(pair("truncation and padding")[0].encode("a", False)) == 1
    assert pair("special tokens map")[0].special_tokens == {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    table = pair("added tokens decoder")[0]
    assert table.decode(table.encode("<think>", False), True) == "<think>" and len(table.encode("<think>", False)) == 1
    assert table.decode(table.encode("<|tool|><|more|>", False), True) == ""
    assert pair("gpt2 class")[0].special_tokens["eos_token"] == "<|endoftext|>"
    bos = pair("vocab, merges and bos")[0]
    assert bos.decode(bos.encode("a<think>", True), False) == "<|endoftext|>a<think>"
    assert len(bos.encode("a<think>", True)) == 3


def test_files_are_read_once_and_again_when_they_change(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    folder, cache = tmp_path / "checkpoint", str(tmp_path / "cache")
    folder.mkdir()
    monkeypatch.setattr(tokenizer_files, "_resolve", in_this_process)
    save(folder, byte_level_bpe(["<|im_end|>"]), {**CHATML, "chat_template": "old"})
    first = read_tokenizer(str(folder), cache)
    assert first.chat_template == "old" and first.eos_id == 0
    (cached,) = (tmp_path / "cache" / "tokenizers").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(tokenizer_files, "_resolve", None)
        assert read_tokenizer(str(folder), cache) == first
        (folder / "model.safetensors").write_bytes(b"weights are no part of a tokenizer")
        assert read_tokenizer(str(folder), cache) == first
    cached.write_bytes(b"damaged")
    (folder / "chat_template.jinja").write_text("new")
    assert read_tokenizer(str(folder), cache).chat_template == "new"
    (folder / "chat_template.jinja").unlink()
    with caplog.at_level(logging.WARNING, "fuseline"):
        assert read_tokenizer(str(folder), cache) == first
    assert "damaged" in caplog.text


def test_a_class_that_cannot_be_used_leaves_the_file(tmp_path: Path) -> None:
    """Code that is not trusted, and no config.json: the tokenizer.json says enough."""
    save(tmp_path, byte_level_bpe(["<|im_end|>"]), {**CHATML, "auto_map": {"AutoTokenizer": ["x.Y", None]}})
    (tmp_path / "config.json").unlink()
    assert describe(load(str(tmp_path), False)).eos_id == 0


def in_this_process(folder: str, trust_remote_code: bool) -> bytes:
    return msgspec.msgpack.encode(describe(load(folder, trust_remote_code)))


def test_a_directory_without_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    (tmp_path / "tokenizer.json").write_text("no json")
    with pytest.raises(ConfigError, match="--tokenizer") as refused:
        read_tokenizer(str(tmp_path), str(tmp_path))
    assert "\n" not in str(refused.value)


def test_the_process_reads_what_this_one_would(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    CHECKPOINTS["llama"](tmp_path / "checkpoint")
    found = read_tokenizer(str(tmp_path / "checkpoint"), str(tmp_path / "cache"))
    assert found == describe(load(str(tmp_path / "checkpoint"), False))


def test_templates_of_several_names(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    save(tmp_path, byte_level_bpe(), {"chat_template": templates})
    assert describe(load(str(tmp_path), False)).chat_template == {"default": "a", "tool_use": "b"}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
