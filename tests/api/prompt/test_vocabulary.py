"""How a vocabulary spells text, told by the tokenizer's decoder alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import decoders

from fuseline.api.prompt.vocabulary import spelling


@pytest.mark.parametrize(("decoder", "want"), [
    (decoders.ByteLevel(), "bytes"), (decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]), "bytes"),
    (decoders.Metaspace(), "metaspace"), (decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]), "metaspace"),
    (decoders.WordPiece(), None), (None, None),
])  # fmt: skip
def test_spelling(decoder, want):
    """Of a large vocabulary the whole tokenizer as JSON would take a fifth of a second of each start."""
    assert spelling(SimpleNamespace(backend=SimpleNamespace(decoder=decoder))) == want
