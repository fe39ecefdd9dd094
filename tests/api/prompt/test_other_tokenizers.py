"""tekken.json or a tokenizer.model as the only file of a tokenizer: read, or refused in one line with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from tokenizer_models import NUM_SPECIALS, SPECIALS, write_sentencepiece, write_tekken

from fuseline.api.config import ConfigError
from fuseline.api.prompt import other_tokenizers, tokenizer_files
from fuseline.api.prompt.auto_tokenizer import describe
from fuseline.api.prompt.other_tokenizers import load_other
from fuseline.api.prompt.tokenizer_files import read_tokenizer


def test_tekken(tmp_path: Path) -> None:
    """Ids are ranks behind the special tokens; a text begins with BOS, and control tokens in it are tokens."""
    write_tekken(tmp_path)
    tokenizer = load_other(tmp_path)
    backend = tokenizer.backend_tokenizer
    byte = {text: NUM_SPECIALS + ord(text) for text in "hex"}
    words = {"the": NUM_SPECIALS + 257, " fox": NUM_SPECIALS + 262}
    assert backend.encode("the fox").ids == [1, words["the"], words[" fox"]]
    assert backend.encode("hex", add_special_tokens=False).ids == [byte["h"], byte["e"], byte["x"]]
    assert backend.encode("[INST]é", add_special_tokens=False).ids == [3, NUM_SPECIALS + 263]
    assert backend.decode([NUM_SPECIALS + 0xE4, NUM_SPECIALS + 0xB8, NUM_SPECIALS + 0xAD]) == "中"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<s>", "</s>", 2)
    assert backend.id_to_token(len(SPECIALS)) == "<SPECIAL_5>"
    files = describe(tokenizer)
    assert files.eos_id == 2 and files.special_tokens["bos_token"] == "<s>"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3"])
def test_a_model_of_sentencepiece_in_mistrals_format(name: str, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    write_sentencepiece(tmp_path / name)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / name))
    tokenizer = load_other(tmp_path)
    for text in ("the fox", "é the", "fox"):
        assert tokenizer.backend_tokenizer.encode(text).ids == [1, *truth.encode(text)]
        assert tokenizer.backend_tokenizer.decode(truth.encode(text)) == text
    assert tokenizer.eos_token_id == 2


def test_a_model_of_sentencepiece_beside_config_json_is_that_of_auto_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_sentencepiece(tmp_path / "tokenizer.model")
    assert load_other(tmp_path) is None
    assert read_tokenizer(str(tmp_path), str(tmp_path / "cache")).eos_id == 2


def test_other_files_are_not_looked_at(tmp_path: Path) -> None:
    assert load_other(tmp_path) is None
    (tmp_path / "tokenizer.model").write_text("aGk= 0\n")  # as of tiktoken
    assert load_other(tmp_path) is None


def test_another_file_of_a_version_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "tokenizer.model.v3").write_bytes(b"\n\xff\xff\xff")
    key = tokenizer_files._key(tmp_path, False)
    with pytest.raises(ConfigError, match="has no tokenizer that can be read"):
        read_tokenizer(str(tmp_path), str(tmp_path / "cache"))
    write_sentencepiece(tmp_path / "tokenizer.model.v3")
    assert tokenizer_files._key(tmp_path, False) != key


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(other_tokenizers, "_is_there", lambda module: module != "sentencepiece")
    for name in ("tokenizer.model.v3", "tokenizer.model"):
        write_sentencepiece(tmp_path / name)
        with pytest.raises(ImportError, match=rf"{name} needs the package sentencepiece: pip install 'fuseline"):
            load_other(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"special_tokens": None}, "pip install mistral-common"), ({"vocab": None}, "tekken.json is damaged"),
        ({"config": None}, "tekken.json is damaged"), ({"vocab": [3]}, "tekken.json is damaged"),
        ({"special_tokens": [{"rank": 4, "token_str": "x"}]}, "ranks must be contiguous"),
    ],
    ids=str,
)  # fmt: skip
def test_tekken_that_cannot_be_read(changes: dict, words: str, tmp_path: Path) -> None:
    write_tekken(tmp_path, **changes)
    with pytest.raises((ImportError, ValueError), match=words):
        load_other(tmp_path)
