"""Text to token ids and back, on the `tokenizers` library alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers

from fuseline.api.config import ConfigError
from fuseline.api.prompt.token_bound import TextBound, find_bound

LONG_TEXT = 8192
"""Characters from which on starting the library's own threads pays."""


class TextTokenizer:
    """The tokenizer of a checkpoint directory. Raises ConfigError when there is none."""

    def __init__(self, folder: str) -> None:
        path = Path(folder) / "tokenizer.json"
        self.settings = read_json(Path(folder) / "tokenizer_config.json")
        self._tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else _converted(folder)
        self._template_file = Path(folder) / "chat_template.jinja"

    @cached_property
    def vocab_size(self) -> int:
        """Ids a tokenizer can decode, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The checkpoint's own template, or several by name."""
        if self._template_file.is_file():
            return read_text(self._template_file)
        template = self.settings.get("chat_template")
        if isinstance(template, list):
            return {item["name"]: item["template"] for item in template}
        return template

    @property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ... as text."""
        found = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"):
            value = self.settings.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[name] = value
        return found

    @property
    def eos_id(self) -> int | None:
        text = self.special_tokens.get("eos_token")
        return None if text is None else self._tokenizer.token_to_id(text)

    @property
    def backend(self) -> Tokenizer:
        """The library's own tokenizer."""
        return self._tokenizer

    @cached_property
    def bytes_per_token(self) -> TextBound | None:
        """The most text that one token can stand for; None where a token can stand for text without end."""
        return find_bound(self._tokenizer)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the tokens that `text` encodes to, at a small part of the cost of encoding; 0 if unknown."""
        return self.bytes_per_token.fewest_tokens(text) if self.bytes_per_token else 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        # A batch of one keeps no offsets (a third less time and memory) and lets other threads run meanwhile.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as text, special ones included; bytes that are no character alone show as U+FFFD."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def token_name(self, token_id: int) -> str:
        """The token as the vocabulary spells it."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of a token, also where they are only part of a character."""
        name = self.token_name(token_id)
        if self._is_byte_level and name not in self._special and all(c in self._byte_of for c in name):
            return bytes(self._byte_of[c] for c in name)
        return self.token_text(token_id).encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(self._tokenizer.decoder)

    @cached_property
    def _special(self) -> set[str]:
        return {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """Byte-level BPE's spelling of the 256 bytes: printable Latin-1 stands for itself, the rest from U+0100 on."""
        plain = [b for b in range(256) if chr(b) in pre_tokenizers.ByteLevel.alphabet()]
        rest = [b for b in range(256) if b not in set(plain)]
        return {chr(b): b for b in plain} | {chr(256 + k): b for k, b in enumerate(rest)}


def _converted(folder: str) -> Tokenizer:
    """The fast form of a tokenizer that has no tokenizer.json."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"{folder} has no tokenizer that can be read (tokenizer.json); give one with --tokenizer, "
            "or --skip-tokenizer-init for token ids only"
        ) from error


def read_text(path: Path) -> str:
    """A file's text. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error


def read_json(path: Path) -> dict:
    """The object in a file, empty when there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is no valid JSON: {error}") from error
    return found if isinstance(found, dict) else {}
