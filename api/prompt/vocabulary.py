"""The vocabulary as the bytes that each token adds to a text: what grammars are matched against."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from fuseline.api.prompt.encode import TextTokenizer
from fuseline.engine.messages import Vocabulary

Spelling = Literal["bytes", "metaspace"]
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def spelling(tokenizer: TextTokenizer) -> Spelling | None:
    """How the vocabulary spells text: byte-level, or with U+2581 for blanks. None where what a token adds to a text
    depends on its neighbours (WordPiece and the like)."""
    # Its state is JSON; that of the whole tokenizer takes a fifth of a second for a large vocabulary.
    decoder = tokenizer.backend.decoder
    decoders = _kinds(json.loads(decoder.__getstate__())) if decoder is not None else set()
    if "ByteLevel" in decoders:
        return "bytes"
    return "metaspace" if decoders & {"Metaspace", "ByteFallback", "Fuse"} else None


def special_ids(tokenizer: TextTokenizer) -> set[int]:
    """Tokens that no text has."""
    return {token for token, added in tokenizer.backend.get_added_tokens_decoder().items() if added.special}


def make_vocabulary(tokenizer: TextTokenizer, eos_token_ids: tuple[int, ...]) -> Vocabulary:
    """The tokens in the order of their ids. Special tokens have no bytes: no text has them."""
    backend, is_bytes = tokenizer.backend, spelling(tokenizer) == "bytes"
    added = backend.get_added_tokens_decoder()
    tokens = []
    for token in range(1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)):
        if token in added:
            tokens.append(b"" if added[token].special else added[token].content.encode())
        else:
            tokens.append(_bytes_of(backend.id_to_token(token) or "", is_bytes))
    return Vocabulary(tokens=tuple(tokens), eos_token_ids=eos_token_ids)


def _bytes_of(name: str, is_bytes: bool) -> bytes:
    if is_bytes:
        return bytes(BYTE_OF[char] for char in name) if all(char in BYTE_OF for char in name) else name.encode()
    if found := BYTE_TOKEN.fullmatch(name):
        return bytes([int(found[1], 16)])
    return name.replace("\u2581", " ").encode()


def _kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    parts = decoder.get("decoders", ())
    return {decoder.get("type", "")}.union(*(_kinds(part) for part in parts))


def _byte_of() -> dict[str, int]:
    """Byte-level BPE's spelling of the 256 bytes: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(rest)}


BYTE_OF = _byte_of()
