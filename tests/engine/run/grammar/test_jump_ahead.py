"""Jump-ahead: a step takes all tokens that a grammar forces, in every order of stages, and no answer changes by it."""

from __future__ import annotations

from functools import cache

import pytest
from engine_walk_cases import ORDERS, Walk, make_engine
from fake_model import VOCAB_SIZE
from overlap_cases import answers

from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import GrammarSpec
from fuseline.engine.run.grammar.backends.interface import Grammar
from fuseline.engine.run.grammar.backends.xgrammar import XGrammarBackend
from fuseline.engine.run.grammar.masks import ForcedTokens

EOS = 0
TOKENS = (b"</s>", *(bytes([code]) for code in range(ord("A"), ord("A") + VOCAB_SIZE - 1)))
FORCED = GrammarSpec(kind="ebnf", text='root ::= ("abcdefgh" | "bcdefgha") [A-D] "ABCDEFGHIJKLMN" [a-b]')
OPEN = GrammarSpec(kind="ebnf", text="root ::= [a-h]{3,12}")
ENDS = {"eos_token_ids": (EOS,), "masked_eos_token_ids": (EOS,)}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
EACH_ORDER = pytest.mark.parametrize("order", ORDERS)


@cache
def compiled(spec: GrammarSpec) -> Grammar:
    return XGrammarBackend(Vocabulary(tokens=TOKENS, eos_token_ids=(EOS,), vocab_size=VOCAB_SIZE)).compile(spec)


def walk_of(order: str, **config: object) -> Walk:
    walk = Walk(make_engine(order=order, **config))
    for spec in (FORCED, OPEN):
        walk.engine.grammars._keep(spec.key, (compiled(spec), 1))
    return walk


def ask_all(order: str, **config: object) -> Walk:
    """Requests with and without a grammar that come one after the other, and one that leaves."""
    walk = walk_of(order, **config)
    settings = ({"temperature": 1.0}, {"temperature": 0.0, "logprobs": 2}, {"temperature": 1.0, "n": 2})
    for number, more in enumerate((*settings, {"repetition_penalty": 1.5}, {"min_tokens": 4, "stop_token_ids": (40,)})):
        for grammar in (FORCED, OPEN, None):
            walk.submit([*PROMPT, number], max_tokens=20 + number, grammar=grammar, **ENDS, **more)
            walk.step()
    gone = walk.submit(PROMPT, max_tokens=30, grammar=FORCED, **ENDS)
    for _ in range(3):
        walk.step()
    walk.engine.abort(gone)
    walk.finish()
    return walk


@EACH_ORDER
@pytest.mark.parametrize(
    "config",
    [{}, {"num_blocks": 17, "enable_prefix_caching": False}, {"rope_threshold": 16}, {"windows": (0, 6)}],
    ids=["plain", "few blocks", "rope switch", "window"],
)
def test_answers_are_those_of_single_tokens(order: str, config: dict, monkeypatch) -> None:
    found = ask_all(order, **config)
    monkeypatch.setattr(ForcedTokens, "propose", lambda self: None)
    single = ask_all("in_order", **config)
    told, expected = answers(found), answers(single)
    gone = list(found.requests)[-1]
    assert {key: value for key, value in told.items() if key[0] != gone} == {
        key: value for key, value in expected.items() if key[0] != gone
    }
    assert not config.get("num_blocks") or found.engine.scheduler.num_preemptions > 0


@EACH_ORDER
def test_forced_tokens_come_in_one_step(order: str) -> None:
    walk = walk_of(order)
    name = walk.submit(PROMPT, max_tokens=40, temperature=1.0, grammar=FORCED, **ENDS)
    walk.finish()
    tokens = walk.tokens(name)
    assert len(tokens) == 25 and tokens[-1] == EOS
    # a choice, 7 forced and the next choice, 14 forced and the last choice, the end
    assert walk.counts == [8, 8, 15, 1]
    assert walk.reason(name) == "stop"


@pytest.mark.parametrize("order", ORDERS[1:])
def test_steps_are_scheduled_ahead_where_few_sequences_have_a_grammar(order: str) -> None:
    walk = walk_of(order, max_num_seqs=8, max_num_batched_tokens=64)
    asked = walk.submit(PROMPT, max_tokens=40, temperature=1.0, grammar=FORCED, **ENDS)
    for number in range(6):
        walk.submit([*PROMPT, number], max_tokens=40)
    for _ in range(4):
        walk.step()
    assert not walk.engine.waits_for_tokens() and walk.engine._order.is_running
    walk.finish()
    assert len(walk.tokens(asked)) == 25
