"""Grammars in the engine: compiled within bounds beside the steps, followed by masks, begun after given tokens."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from grammar_walk import compiled, demo_vocabulary

from fuseline.engine.config import GrammarConfig
from fuseline.engine.params import GrammarSpec, SamplingParams
from fuseline.engine.run.grammar import matcher
from fuseline.engine.run.grammar.compiler import GrammarCompiler, GrammarError
from fuseline.engine.run.grammar.matcher import GrammarState
from fuseline.engine.service import EngineService

WORDS = random.Random(0)
HEAVY, LARGE = (
    "root ::= " + " | ".join(f'"{WORDS.getrandbits(256):x}"' for _ in range(count)) for count in (6000, 100)
)
YES = GrammarSpec(kind="ebnf", text='root ::= "yes"')


def compile_all(compiler: GrammarCompiler, *specs: GrammarSpec) -> list[object]:
    """Results in the order in which they are done."""
    ready, found = threading.Event(), []
    compiler.on_ready = ready.set
    compiler.set_vocabulary(demo_vocabulary())
    for spec in specs:
        compiler.start(spec)
    while len(found) < len(specs):
        assert ready.wait(120)
        ready.clear()
        found += [result for _, result in compiler.take_finished()]
    return found


@pytest.mark.parametrize(
    ("text", "bounds", "word"),
    [
        (HEAVY, {"grammar_timeout": 0.3}, "--grammar-timeout"),
        (HEAVY, {"grammar_memory": 40 * 2**20}, "--grammar-memory"),
        (LARGE, {"grammar_cache_bytes": 10_000}, "--grammar-cache-bytes"),
    ],
    ids=["time", "memory", "size"],
)
def test_a_grammar_beyond_the_bounds_is_refused_and_the_next_one_compiles(text, bounds, word):
    compiler = GrammarCompiler(GrammarConfig(**bounds, grammar_workers=1), demo_vocabulary().vocab_size)
    try:
        refused, good = compile_all(compiler, GrammarSpec(kind="ebnf", text=text), YES)
        assert isinstance(refused, GrammarError) and word in str(refused)
        assert not isinstance(good, GrammarError) and compiler.find(YES) is not None
    finally:
        compiler.close()


@pytest.mark.parametrize("is_gpu", [False, True])
def test_a_gpu_has_a_process_for_grammars_before_the_first_request(is_gpu):
    compiler = GrammarCompiler(GrammarConfig(), demo_vocabulary().vocab_size)
    ready = threading.Event()
    compiler.on_ready = ready.set
    served = object.__new__(EngineService)
    served.engine, served.device = SimpleNamespace(grammars=compiler), SimpleNamespace(is_asynchronous=is_gpu)
    try:
        served._handle(demo_vocabulary())
        assert ready.wait(120 if is_gpu else 0) == is_gpu
        assert [isinstance(found, GrammarError) for _, found in compiler.take_finished()] == [False] * is_gpu
        assert len(compiler._workers) == is_gpu
    finally:
        compiler.close()


def state(spec: GrammarSpec, **params) -> GrammarState:
    settings = SamplingParams(masked_eos_token_ids=demo_vocabulary().eos_token_ids, grammar=spec, **params)
    return GrammarState(compiled(spec), settings, demo_vocabulary().vocab_size)


def allowed(mask: np.ndarray) -> set[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return set(bits[: demo_vocabulary().vocab_size].nonzero()[0].tolist())


def token(text: str) -> int:
    return demo_vocabulary().tokens.index(text.encode())


def test_grammar_begins_after_the_given_tokens_and_nothing_ends_before():
    (eos,) = demo_vocabulary().eos_token_ids
    begin = (token("a"), token("b"))
    followed = state(GrammarSpec(kind="ebnf", text='root ::= "y"', starts_after=begin))
    followed.advance([token("b"), token("a"), token("a")])
    assert allowed(followed.masks([])[0]) == set(range(demo_vocabulary().vocab_size)) - {eos}
    assert [allowed(mask) for mask in followed.masks([token("b"), token("y")])[1:]] == [{token("y")}, {eos}]
    followed.advance([token("b")])
    assert allowed(followed.masks([])[0]) == {token("y")}


def test_masks_behind_drafts_leave_the_state_as_it_was():
    followed = state(GrammarSpec(kind="ebnf", text='root ::= "1" [2-3] "4"'))
    before = followed.masks([])
    one, two, four, wrong = (token(char) for char in "124x")
    masks = followed.masks([one, wrong, two])
    assert allowed(masks[1]) == {two, token("3")} and (followed.masks([]) == before).all()
    assert [allowed(mask) for mask in followed.masks([one, two])[2:]] == [{four}]


def test_forced_tokens_are_those_without_a_choice():
    followed = state(GrammarSpec(kind="ebnf", text='root ::= [5] [6] [7-8] "!"'))
    assert followed.forced(15) == [token("5"), token("6")] and followed.forced(1) == [token("5")]
    followed.advance([token("5"), token("6"), token("8")])
    assert followed.forced(15) == [token("!")]  # then it may only end


def test_a_step_looks_for_forced_tokens_for_a_short_time(monkeypatch):
    """What it has found out by then is not lost."""
    monkeypatch.setattr(matcher, "FORCED_SECONDS", -1.0)
    followed = state(GrammarSpec(kind="ebnf", text='root ::= [5] [6] [7-8] "!"'))
    assert followed.forced(15) == [] and allowed(followed.masks([])[0]) == {token("5")}
    followed.advance([token("5")])
    assert allowed(followed.masks([])[0]) == {token("6")}


def test_min_tokens_lose_against_a_complete_grammar():
    (eos,) = demo_vocabulary().eos_token_ids
    followed = state(GrammarSpec(kind="ebnf", text='root ::= "a" "b"?'), min_tokens=5)
    followed.advance([token("a")])
    assert allowed(followed.masks([])[0]) == {token("b")}
    followed.advance([token("b")])
    assert allowed(followed.masks([])[0]) == {eos}
