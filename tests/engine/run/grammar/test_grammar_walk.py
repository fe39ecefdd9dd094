"""Grammars in engines with a fake model: what happens to a sequence on its way never changes its tokens."""

from __future__ import annotations

import re

import pytest
from engine_walk_cases import ORDERS, Walk, make_engine
from fake_model import VOCAB_SIZE

from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import GrammarSpec
from fuseline.engine.run.grammar.backends.xgrammar import XGrammarBackend

EOS = 0
FIRST = ord("A") - 1  # token 1 is "A"
VOCABULARY = Vocabulary(
    tokens=(b"", *(bytes([FIRST + token]) for token in range(1, VOCAB_SIZE))), eos_token_ids=(EOS,),
    vocab_size=VOCAB_SIZE,
)  # fmt: skip
ONE_FORCED, RUNS, CHOICES = (
    GrammarSpec(kind="ebnf", text=text)
    for text in ('root ::= ([A-H] "I"){5}', 'root ::= ([A-C] "DEFGHI" [J-Z]){3}', "root ::= ([A-Z] [a-f]){2,12}")
)
SPECS = (ONE_FORCED, RUNS, CHOICES, None)
COMPILED = {spec.key: XGrammarBackend(VOCABULARY).compile(spec) for spec in SPECS if spec}
PROMPT = list(range(1, 13))


def walk(order: str, num_blocks: int, **settings) -> Walk:
    engine = make_engine(order=order, num_blocks=num_blocks, **settings)
    for key, grammar in COMPILED.items():
        engine.grammars._keep(key, (grammar, 1))
    return Walk(engine)


def submit(made: Walk, number: int) -> str:
    return made.submit(
        PROMPT, seed=number, max_tokens=26, eos_token_ids=(EOS,), masked_eos_token_ids=(EOS,),
        grammar=SPECS[number % len(SPECS)], min_tokens=6 * (number % 3), temperature=float(number % 5 > 0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """Tokens of each request, in an engine of its own."""
    found = []
    for number in range(12):
        made = walk("in_order", 40)
        name = submit(made, number)
        made.finish()
        found.append(made.tokens(name))
    return found


@pytest.mark.parametrize("num_host_blocks", [0, 60])
@pytest.mark.parametrize("order", ORDERS)
def test_preemption_prefix_cache_and_company_do_not_change_tokens(alone, order, num_host_blocks):
    made = walk(order, 17, num_host_blocks=num_host_blocks)
    names = []
    for number in range(len(alone)):
        names.append(submit(made, number))
        made.step()
    made.finish()
    assert [made.tokens(name) for name in names] == alone
    scheduler = made.engine.scheduler
    assert scheduler.num_preemptions > 0 and scheduler.prefix_hits > 0
    assert (scheduler.host_hits > 0) == (num_host_blocks > 0)


def test_the_tokens_are_those_of_the_grammars(alone):
    patterns = (r"([A-H]I){5}", r"([A-C]DEFGHI[J-Z]){3}", r"([A-Z][a-f]){2,12}")
    for number, tokens in enumerate(alone):
        if number % len(SPECS) < len(patterns):
            text = b"".join(VOCABULARY.tokens[token] for token in tokens).decode()
            assert tokens[-1] == EOS and re.fullmatch(patterns[number % len(SPECS)], text)


@pytest.mark.parametrize(("spec", "num_rows", "num_steps"), [(RUNS, 1, 7), (ONE_FORCED, 1, 6), (ONE_FORCED, 6, 10)])
def test_a_step_brings_forced_tokens_if_they_are_many_for_its_sequences(spec, num_rows, num_steps):
    """One is held by the grammar. Beside five others a forced token is a draft only while these begin."""
    made = walk("in_order", 200, max_num_seqs=6)
    for number in range(num_rows):
        params = {"min_tokens": 20} if number else {"grammar": spec}
        made.submit(PROMPT, max_tokens=40, eos_token_ids=(EOS,), **params)
    while made.engine.has_work and not any(output.finish_reason for output in made.outputs.get(("r0", 0), ())):
        made.step()
    assert len(made.counts) == num_steps
