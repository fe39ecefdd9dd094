"""Choices among many texts share their beginnings: the same language, and masks that cost next to nothing."""

from __future__ import annotations

import json
import random
import re
import time
from functools import cache

import pytest
import xgrammar as xg

from fuseline.api.prompt.grammar import json_spec, request_spec
from fuseline.api.protocol.chat import ChatRequest
from fuseline.api.structured.ebnf import Rules, one_of

END = 256
RNG = random.Random(0)
LISTS = {
    "numbered": [f"word {k}" for k in range(5000)],
    "random": [f"{RNG.getrandbits(RNG.randrange(4, 40)):x}" for _ in range(1000)],
    "beginnings of others": ["a" * k + tail for k in range(200) for tail in ("", "b", "é", "🎉")],
    "few": ["yes", "no", "yes!", "yesterday"],
    "quotes": [f"{k % 7}\"{k}\\" for k in range(100)],
}


@cache
def compiler() -> xg.GrammarCompiler:
    vocabulary = [bytes([k]) for k in range(256)] + [b"</s>"]
    info = xg.TokenizerInfo(vocabulary, vocab_type=xg.VocabType.RAW, stop_token_ids=[END])
    return xg.GrammarCompiler(info, max_threads=1)


def takes(grammar: xg.CompiledGrammar, text: str) -> bool:
    found = xg.GrammarMatcher(grammar)
    return all(map(found.accept_token, text.encode())) and found.accept_token(END)


@pytest.mark.parametrize("name", LISTS)
def test_one_of_takes_the_texts_and_no_others(name: str) -> None:
    texts, rules = LISTS[name], Rules()
    grammar = compiler().compile_grammar(rules.text(one_of(rules, texts)))
    for text in RNG.sample(texts, min(60, len(texts))):
        assert takes(grammar, text)
        for other in (text + "x", text[:-1], "x" + text):
            assert takes(grammar, other) == (other in texts), other


@pytest.mark.parametrize("field", ["guided_choice", "guided_json", "guided_regex"])
def test_masks_of_20000_texts_take_no_time(field: str) -> None:
    words = [f"word {k}" for k in range(20_000)]
    value = words if field == "guided_choice" else {"enum": words} if field == "guided_json" else f"({'|'.join(words)})"
    spec = request_spec(ChatRequest.model_validate({"messages": [], field: value}))
    found, mask = xg.GrammarMatcher(compiler().compile_grammar(spec.text)), xg.allocate_token_bitmask(1, END + 1)
    seconds = []
    for byte in (b'"word 12345"' if field == "guided_json" else b"word 12345"):
        started = time.thread_time()
        found.fill_next_token_bitmask(mask)
        assert found.accept_token(byte)
        seconds.append(time.thread_time() - started)
    assert max(seconds) < 0.01, "side by side they take 30 ms and more"


def test_a_regex_of_many_texts_takes_them_and_no_others() -> None:
    """Also within a JSON string, and where some are no plain text."""
    texts = [f"é{k}" for k in range(90)]
    for more, extra in (('a"b', 'a"b'), ("x+", "xx")):
        pattern = "|".join((*texts, more))
        plain = compiler().compile_grammar(request_spec(ChatRequest.model_validate(
            {"messages": [], "guided_regex": pattern}
        )).text)  # fmt: skip
        quoted = compiler().compile_grammar(json_spec({"type": "string", "pattern": pattern}).text)
        for text in ("é0", "é89", extra, "é90", "é", "y"):
            is_taken = re.fullmatch(pattern, text) is not None
            assert takes(plain, text) == is_taken and takes(quoted, json.dumps(text, ensure_ascii=False)) == is_taken


def test_what_a_schema_of_many_constants_holds() -> None:
    values = [*range(150), None, True, "7", [1, "x"], {"k": 3}]
    grammar = compiler().compile_grammar(json_spec({"enum": values}).text)
    for text in ("0", "149", "null", "true", '"7"', '[1,"x"]', '{"k":3}'):
        assert takes(grammar, text), text
    for text in ("150", "00", "false", '"8"', "7.0", "[1]"):
        assert not takes(grammar, text), text
