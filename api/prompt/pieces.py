"""Text of single tokens inside a text, as the tokenizer's own decoder makes it.

A decoder treats the first token of a text in its own way (Llama-2 drops the blank of "▁Paris" there) and joins bytes to
characters. So a token is decoded behind another one, and one that may be part of a character stays as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, pre_tokenizers

SINGLE = {"Replace", "ByteFallback", "Metaspace", "WordPiece"}
"""Steps of a decoder that treat each token but the first alone, up to the one that joins them."""
JOINING = {"ByteLevel", "Fuse"}
TRIED = 4096
"""Tokens among which one is looked for that others are decoded behind."""


class TokenPieces:
    """Pieces of text by token id: `str`, or `bytes` where they may be part of a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        steps = decoder_steps(tokenizer)
        kinds = [step["type"] for step in steps]
        self.has_runs = "ByteFallback" in kinds
        """Bytes that follow each other are characters all together or not at all (byte fallback of SentencePiece)."""
        self._anchor = _find_anchor(tokenizer) if _is_context_free(steps) else None
        is_byte_level = self._anchor is not None and kinds[:1] == ["ByteLevel"]
        self._byte_of = _byte_of_character() if is_byte_level else {}
        self._known: dict[int, str | bytes] = {}

    def piece(self, token: int, previous: int | None) -> str | bytes | None:
        """Text of a token behind `previous` (None: at the beginning of a text); None for an id without a token.

        A model can have more ids than its tokenizer.
        """
        known = self._known.get(token) if previous is not None else None
        if known is not None:
            return known
        if self._tokenizer.id_to_token(token) is None:
            return None
        if previous is None:
            return self._first(token)
        known = self._bytes(token)
        if known is None and self._anchor is None:  # depends on the token before, whichever it is
            return self._behind(previous, token)
        known = self._known[token] = self._behind(self._anchor, token) if known is None else known
        return known

    def inner(self, token: int) -> str | bytes:
        """Text of a token inside a text; empty for an id without a token."""
        return self.piece(token, token if self._anchor is None else self._anchor) or ""

    def _first(self, token: int) -> str | bytes:
        found = self._bytes(token)
        return self._decode(token) if found is None or found == b" " else found

    def _bytes(self, token: int) -> str | bytes | None:
        """The bytes that a token spells; as text where they are whole characters and end what came before."""
        name = self._tokenizer.id_to_token(token)
        if self._byte_of:
            is_spelled = set(name) <= self._byte_of.keys()
            return _as_text(bytes(self._byte_of[c] for c in name) if is_spelled else name.encode())
        if self.has_runs and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes.fromhex(name[3:5])
        return None

    def _behind(self, previous: int, token: int) -> str:
        return self._decode(previous, token)[len(self._decode(previous)) :]

    def _decode(self, *tokens: int) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)


def decoder_steps(tokenizer: Tokenizer) -> list[dict]:
    """The settings of the decoder; of a sequence, those of its members."""
    if tokenizer.decoder is None:
        return []
    settings = json.loads(tokenizer.decoder.__getstate__())
    return settings["decoders"] if settings["type"] == "Sequence" else [settings]


def _is_context_free(steps: Iterable[dict]) -> bool:
    """A token's text depends on nothing but whether it is the first one."""
    is_joined = False
    for step in steps:
        kind = step["type"]
        if kind == "Strip":
            if is_joined and step["stop"]:
                return False
        elif kind in JOINING:
            is_joined = True
        elif is_joined or kind not in SINGLE:
            return False
    return True


def _find_anchor(tokenizer: Tokenizer) -> int | None:
    """A token whose text stays as it is when another one follows."""
    added = tokenizer.get_added_tokens_decoder()
    for token in range(min(tokenizer.get_vocab_size(), TRIED)):
        if token not in added:
            text = tokenizer.decode([token])
            if text.isalnum() and tokenizer.decode([token, token]).startswith(text):
                return token
    return None


def _as_text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's spelling of the 256 bytes: printable Latin-1 stands for itself, the rest from U+0100 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    plain = [b for b in range(256) if chr(b) in alphabet]
    rest = [b for b in range(256) if chr(b) not in alphabet]
    return {chr(b): b for b in plain} | {chr(256 + k): b for k, b in enumerate(rest)}
