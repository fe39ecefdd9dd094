"""Reasoning within a budget of tokens: counted between its marks, ended by the text of its end, drafts or not."""

from __future__ import annotations

import numpy as np
import pytest

from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import GrammarSpec, SamplingParams, ThinkingBudget
from fuseline.engine.run.grammar.backends.xgrammar import XGrammarBackend
from fuseline.engine.run.grammar.matcher import GrammarState
from fuseline.engine.run.grammar.thinking import BudgetState

SPECIAL, EOS = 257, 256
"""SPECIAL is a token without text that stands for the end."""
WORD = 258
VOCABULARY = Vocabulary(
    tokens=(*(bytes([k]) for k in range(256)), b"", b"", b"word"), eos_token_ids=(EOS,), vocab_size=259
)  # fmt: skip
BASE = ThinkingBudget(num_tokens=3, begins=("<t>",), ends=("</t>",), end_token_ids=tuple(b"</t>"))
ALL = set(range(259)) | set(range(259, 288))


def allowed(mask: np.ndarray) -> set[int]:
    return set(np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist())


def run(state: BudgetState, tokens: list[int]) -> list[set[int]]:
    """Masks before each token and behind the last one; those of drafts must be the same."""
    with_drafts = [allowed(mask) for mask in state.masks(tokens)]
    found = [allowed(state.mask())]
    for token in tokens:
        state.advance([token])
        found.append(allowed(state.mask()))
    assert found == with_drafts
    return found


def made(**fields) -> BudgetState:
    fields = {name: getattr(BASE, name) for name in BASE.__struct_fields__} | fields
    return BudgetState(ThinkingBudget(**fields), VOCABULARY, None)


def test_the_end_is_forced_when_the_budget_is_spent() -> None:
    masks = run(made(), [*b"<t>abc</t>def"])
    assert masks[:6] == [ALL] * 6 and masks[6:10] == [{byte} for byte in b"</t>"] and masks[10:] == [ALL] * 4
    assert run(made(is_open=True), [*b"abc</t>d"])[3:7] == [{byte} for byte in b"</t>"]
    assert run(made(num_tokens=0), [*b" \n<t>"])[-1] == {ord("<")}
    assert run(made(num_tokens=0, is_open=True), [])[0] == {ord("<")}


@pytest.mark.parametrize("text", [b"<t>ab</t>cdefgh", b"no <t>abcdef", b"<x><t>abcdef", b"", b"abcdef"])
def test_nothing_is_forced_where_reasoning_has_ended_or_never_begun(text: bytes) -> None:
    assert run(made(), [*text]) == [ALL] * (1 + len(text))


def test_tokens_are_counted_not_characters() -> None:
    masks = run(made(), [*b"<t>", WORD, WORD, WORD])
    assert masks[:-1] == [ALL] * 6 and masks[-1] == {ord("<")}


def test_an_end_that_is_a_special_token() -> None:
    fields = {"end_token_ids": (SPECIAL,), "spelled": ((SPECIAL, "</t>"),)}
    assert run(made(**fields), [*b"<t>abc", SPECIAL, *b"d"])[-3:] == [{SPECIAL}, ALL, ALL]
    assert run(made(**fields), [*b"<t>a", SPECIAL, *b"bcdef"])[-1] == ALL


def test_a_character_is_completed_first() -> None:
    masks = run(made(), [*b"<t>ab", *"é".encode()])
    assert masks[-2] == ALL and masks[-1] == {ord("<")}
    broken = run(made(), [*b"<t>ab", 0xF0, 0xF0, 0xF0, 0xF0])
    assert broken[-1] == {ord("<")}  # a text that is no text is not waited for


def test_reasoning_that_is_resumed_has_one_budget() -> None:
    masks = run(made(may_resume=True), [*b"<t>ab</t>x<t>c"])
    assert masks[-1] == {ord("<")} and masks[:-1] == [ALL] * (len(masks) - 1)


def test_the_end_is_taken_in_one_step() -> None:
    state = made()
    state.advance([*b"<t>abc"])
    assert state.forced(15) == [*b"</t>"] and state.forced(2) == [*b"</"]
    state.advance([*b"</"])
    assert state.forced(15) == [*b"t>"]
    state.advance([*b"t>"])
    assert state.forced(15) == []


def test_a_grammar_goes_on_behind_the_forced_end() -> None:
    spec = GrammarSpec(kind="ebnf", text='root ::= ("<t>" [a-zà-ü]* "</t>")? "yes"')
    params = SamplingParams(masked_eos_token_ids=(EOS,), grammar=spec)
    inner = GrammarState(XGrammarBackend(VOCABULARY).compile(spec), params, VOCABULARY.vocab_size)
    state = BudgetState(BASE, VOCABULARY, inner)
    masks = run(state, [*b"<t>ab", *"à".encode(), *b"</t>"])
    assert masks[6] == set(range(0xA0, 0xBD))  # within a character
    assert masks[7:] == [{byte} for byte in b"</t>y"] and state.forced(15) == [*b"yes"]
