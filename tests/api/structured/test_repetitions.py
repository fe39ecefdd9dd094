"""Counted repetitions of any size: exactly the counts asked for, and masks that are as cheap as those of small ones."""

from __future__ import annotations

import re

import pytest
import xgrammar as xg
from count_lines import executed_lines

from fuseline.api.structured.ebnf import BLOCK, Rules
from fuseline.api.structured.regex import RegexGrammar
from fuseline.api.structured.schema import SchemaGrammar

INFO = xg.TokenizerInfo(["a", "</s>"], vocab_type=xg.VocabType.RAW, vocab_size=2, stop_token_ids=[1])


def counts(fewest: int, most: int | None, end: int) -> list[int]:
    """Those below `end` at which a text of so many repetitions may end."""
    rules = Rules()
    text = rules.text(rules.repeat('"a"', fewest, most))
    matcher = xg.GrammarMatcher(xg.GrammarCompiler(INFO, max_threads=1).compile_grammar(text))
    mask, found = xg.allocate_token_bitmask(1, 2), []
    for count in range(end):
        mask.fill_(-1)
        matcher.fill_next_token_bitmask(mask)
        if mask[0, 0] & 2:
            found.append(count)
        if not matcher.accept_token(0):
            break
    return found


@pytest.mark.parametrize(
    ("fewest", "most"),
    [(0, BLOCK + 1), (0, 2 * BLOCK), (31, 65), (33, 33), (64, 64), (40, None), (64, 130), (1, 1100), (0, BLOCK**2 + 1)],
)
def test_just_the_counts_that_are_asked_for(fewest: int, most: int | None) -> None:
    end = 200 if most is None else most + 2
    assert counts(fewest, most, end) == [n for n in range(end) if fewest <= n and (most is None or n <= most)]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 10**9},
        {"type": "string", "minLength": 10**9},
        {"type": "string", "pattern": "^([a-z]{1,200}x){7,5000}$"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**7},
        {"type": "array", "maxItems": 500, "items": {"type": "array", "maxItems": 500, "items": {"maxLength": 500}}},
    ],
)
def test_no_count_within_a_grammar_is_a_long_one(schema: dict) -> None:
    """A longer one would have xgrammar check the whole vocabulary in each step of the engine."""
    rules = Rules()
    text = rules.text(SchemaGrammar(schema, rules, "guided_json").expression())
    bounds = [int(bound) for pair in re.findall(r"\{(\d+),(\d*)\}", text) for bound in pair if bound]
    assert bounds and max(bounds) <= BLOCK and len(text) < 4000


@pytest.mark.parametrize("part", ["a", "a.", "(a|b)", "[a-z]{2}", "^"])
def test_a_long_regex_takes_work_in_proportion(part: str) -> None:
    short, long = (
        executed_lines(lambda size=size: RegexGrammar(Rules(), "guided_regex").expression(part * size + "x"))
        for size in (500, 2000)
    )
    assert short < long < 4.2 * short


@pytest.mark.parametrize("pattern", ["^a$", r"\Aa\Z", "^^a$$", "(^a$)", "^$", "^(a|^b)$", "$"])
def test_anchors_at_the_borders_say_nothing(pattern: str) -> None:
    assert "^" not in RegexGrammar(Rules(), "guided_regex").expression(pattern)
