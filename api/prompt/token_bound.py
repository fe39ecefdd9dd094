"""A lower bound of the number of tokens of a text, without encoding it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers

SHRINKING = {"NFC": 3, "NFD": 3, "NFKD": 4, "NFKC": 12, "Lowercase": 3, "Prepend": 1, "ByteLevel": 1}
"""Normalizer -> the most UTF-8 bytes of which it makes one (NFC: U+212A becomes K; NFKD: U+1D400 becomes A)."""
KEEPING = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation", "UnicodeScripts"}


@dataclass(frozen=True)
class TextBound:
    """The most UTF-8 bytes of text that one token stands for."""

    num_bytes: int
    ignores_blanks: bool
    """A special token can take the blanks around it, as many as there are, so they count for nothing."""

    def fewest_tokens(self, text: str) -> int:
        kept = "".join(text.split()) if self.ignores_blanks else text
        return -(-len(kept.encode(errors="replace")) // self.num_bytes)


def find_bound(tokenizer: Tokenizer) -> TextBound | None:
    """None where text can vanish: an unknown word as one token, dropped blanks, a truncating tokenizer."""
    if tokenizer.truncation is not None or not _keeps_unknown_text(tokenizer):
        return None
    shrinking = 1
    for step in _steps(tokenizer.normalizer, "normalizers"):
        factor = _normalizer_factor(step)
        if factor is None:
            return None
        shrinking *= factor
    if not all(_keeps_text(step) for step in _steps(tokenizer.pre_tokenizer, "pretokenizers")):
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    length = len if _is_byte_level(tokenizer) else _num_bytes  # byte-level names spell a byte as one character
    longest = max(
        max(map(length, tokenizer.get_vocab(with_added_tokens=False)), default=1),
        max((len(token.content.encode()) for token in added), default=1),
    )
    return TextBound(longest * shrinking, any(token.lstrip or token.rstrip for token in added))


def _num_bytes(name: str) -> int:
    return len(name.encode())


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    steps = [*_steps(tokenizer.pre_tokenizer, "pretokenizers"), *_steps(tokenizer.normalizer, "normalizers")]
    return any(step["type"] == "ByteLevel" for step in steps)


def _keeps_unknown_text(tokenizer: Tokenizer) -> bool:
    """Every byte of the text ends in some token, and no token stands for several unknown characters."""
    model = tokenizer.model
    if not isinstance(model, models.BPE):
        return False
    names: list[str] = []
    if _is_byte_level(tokenizer):
        names = pre_tokenizers.ByteLevel.alphabet()
    elif model.byte_fallback:
        names = [f"<0x{byte:02X}>" for byte in range(256)]
    if names and all(model.token_to_id(name) is not None for name in names):
        return True  # nothing is unknown
    return model.unk_token is not None and not model.fuse_unk


def _steps(part: object, inner: str) -> Iterable[dict]:
    """The settings of a normalizer or pre-tokenizer, of a sequence those of its members."""
    if part is None:
        return []
    settings = json.loads(part.__getstate__())
    return settings[inner] if settings["type"] == "Sequence" else [settings]


def _normalizer_factor(step: dict) -> int | None:
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        return 1 if pattern is not None and len(pattern.encode()) <= len(step["content"].encode()) else None
    return SHRINKING.get(step["type"])


def _keeps_text(step: dict) -> bool:
    return step["type"] in KEEPING and step.get("behavior") != "Removed"
