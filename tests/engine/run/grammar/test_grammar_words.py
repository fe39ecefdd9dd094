"""What is wrong with a grammar, in words without the insides of the library that compiles it."""

from __future__ import annotations

import pytest

from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import GrammarSpec
from fuseline.engine.run.grammar.backends.registry import Backends
from fuseline.engine.run.grammar.worker import Failed, _answer

BAD = [
    ("ebnf", "root ::= x", '"x" is not defined'), ("ebnf", 'root ::= "a', "Expect"),
    ("ebnf", "root ::= [z-a]", "lower"),
    ("ebnf", "root ::= Token(99999)", "99999"), ("lark", "start: x", "unknown name"),
    ("lark", "start: /[/", "Unclosed"), ("structural_tag", '{"type":"structural_tag","format":{"type":"zz"}}', "zz"),
    ("structural_tag", '{"type":"structural_tag"}', "format"),
]  # fmt: skip


@pytest.fixture(scope="module")
def backends() -> Backends:
    tokens = tuple(bytes([k]) for k in range(256))
    return Backends(Vocabulary(tokens=tokens, eos_token_ids=(0,), vocab_size=256))


@pytest.mark.parametrize(("kind", "text", "words"), BAD)
def test_words(kind: str, text: str, words: str, backends: Backends) -> None:
    found = _answer(GrammarSpec(kind=kind, text=text), backends, 256)
    assert isinstance(found, Failed) and words in found.message
    assert not any(inner in found.message for inner in ("Check failed", ".cc", ".h:", "std::", "is false"))
