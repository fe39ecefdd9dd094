"""Files of tokenizers without a tokenizer.json: tekken.json, and tokenizer.model of SentencePiece."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

SPECIALS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
NUM_SPECIALS = 20
WORDS = (b"th", b"the", b" t", b" the", b" f", b"ox", b" fox", b"\xc3\xa9")
"""Byte pairs that are tokens, after the 256 bytes; each is made of two before it."""
PIECES = ("\u2581t", "he", "\u2581the", "fo", "\u2581f", "\u2581fo", "\u2581fox", "\u2581", *"thefox")
"""Of SentencePiece, the likeliest first."""


def write_tekken(folder: Path, **changes: Any) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + list(WORDS)
    vocab = [{"rank": k, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
             for k, token in enumerate(tokens)]  # fmt: skip
    config = {"pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+", "version": "v3",
              "num_vocab_tokens": len(vocab), "default_vocab_size": len(vocab) + NUM_SPECIALS,
              "default_num_special_tokens": NUM_SPECIALS}  # fmt: skip
    specials = [{"rank": k, "token_str": text, "is_control": True} for k, text in enumerate(SPECIALS)]
    content = {"config": config, "vocab": vocab, "special_tokens": specials} | changes
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "tekken.json").write_text(json.dumps(content))


def write_sentencepiece(path: Path) -> None:
    """A model of byte pairs with the bytes as a fallback."""
    from transformers.convert_slow_tokenizer import import_protobuf

    protobuf = import_protobuf()
    model = protobuf.ModelProto()
    rows = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    for piece, kind in [*rows, *((piece, 1) for piece in dict.fromkeys(PIECES))]:
        added = model.pieces.add()
        added.piece, added.type, added.score = piece, kind, -float(len(model.pieces)) if kind == 1 else 0.0
    settings = model.trainer_spec
    settings.model_type, settings.byte_fallback, settings.vocab_size = 2, True, len(model.pieces)
    settings.unk_id, settings.bos_id, settings.eos_id, settings.pad_id = 0, 1, 2, -1
    model.normalizer_spec.name, model.normalizer_spec.add_dummy_prefix = "identity", True
    model.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString())
