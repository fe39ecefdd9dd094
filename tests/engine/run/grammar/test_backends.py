"""The grammars of each backend: what they let through is valid, and their matchers are alike."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from grammar_walk import backends, compiled, demo_vocabulary, walk
from jsonschema import Draft202012Validator
from schema_cases import REGEXES, schemas

from fuseline.api.errors import ApiError
from fuseline.api.prompt.backends import PACKAGES
from fuseline.api.prompt.grammar import request_spec
from fuseline.api.protocol.common import GenerateRequest
from fuseline.engine.params import GrammarSpec, SamplingParams
from fuseline.engine.run.grammar.backends.registry import MAKERS
from fuseline.engine.run.grammar.matcher import GrammarState
from fuseline.engine.run.grammar.worker import try_walk

NAMES = sorted(PACKAGES)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}, "height": {"type": "number"},
        "kind": {"enum": ["a", "bc"]}, "is_new": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "null"}},
    },
    "required": ["name", "kind"], "additionalProperties": False,
}  # fmt: skip
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}},
    },
}
SCHEMAS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "object": (PERSON, tuple(NAMES)),
    "items": ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3}, tuple(NAMES)),
    "any": ({"anyOf": [PERSON, {"type": "boolean"}]}, tuple(NAMES)),
    "reference": ({**PERSON, "properties": {**PERSON["properties"], "age": {"$ref": "#/$defs/n"}},
                   "$defs": {"n": {"type": "integer"}}}, tuple(NAMES)),
    "recursion": (TREE, ("guidance", "lm-format-enforcer")),
    "numbers": ({"enum": [1, 2.5, None, "é\n"]}, ("guidance", "outlines")),
    "constant": ({"const": "x y"}, tuple(NAMES)),
    "lengths": ({"type": "string", "minLength": 2, "maxLength": 5}, ("guidance", "outlines")),
    "pattern": ({"type": "string", "pattern": r"^(ab|c)[0-9x]{2}\.z?$"}, ("guidance", "outlines")),
    "uuid": ({"type": "string", "format": "uuid"}, ("guidance", "outlines")),
    "bounds": ({"type": "integer", "minimum": 3, "maximum": 17}, ("guidance",)),
    "additional": ({"type": "object", "additionalProperties": {"type": "integer"}}, ("guidance",)),
    "all": ({"allOf": [{"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}]}, ("guidance",)),
}  # fmt: skip


PATTERNS = (r"\d{3}-[a-z]{1,9}", r"^(a|bc)*\$$", "[^x]y?|é", r"(\w+@)?\.com", r"[\w.]+\W\D[\]\d]", *REGEXES)


def spec(name: str, **fields: Any) -> GrammarSpec:
    return request_spec(GenerateRequest(**fields, guided_decoding_backend=f"{name}:no-fallback"))


def check(made: GrammarSpec, schema: dict[str, Any], seeds: int) -> list[str]:
    """Texts of the schema's grammar, which are valid."""
    grammar, checker = compiled(made), Draft202012Validator.FORMAT_CHECKER
    validator = Draft202012Validator(schema, format_checker=checker)
    texts = [text for seed in range(seeds) if (text := walk(grammar, seed, 200)) is not None]
    for text in texts:
        validator.validate(json.loads(text))
    return texts


@pytest.mark.parametrize(("name", "fewest"), [("guidance", 60), ("outlines", 6), ("lm-format-enforcer", 1)])
def test_the_schemas_of_the_suite(name: str, fewest: int) -> None:
    num_taken = 0
    for schema in schemas()[::4]:
        try:
            made = spec(name, guided_json=schema)
        except ApiError as refused:
            assert "does not enforce" in refused.message
            continue
        num_taken += 1
        check(made, schema, 2)
    assert num_taken >= fewest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", SCHEMAS)
def test_schemas_are_enforced_or_refused(name: str, case: str) -> None:
    schema, takers = SCHEMAS[case]
    if name not in takers:
        with pytest.raises(ApiError, match="does not enforce"):
            spec(name, guided_json=schema)
        assert request_spec(GenerateRequest(guided_json=schema, guided_decoding_backend=name)).backend == "xgrammar"
        return
    made = spec(name, guided_json=schema)
    assert made.backend == name
    assert len(check(made, schema, 6)) >= 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_regexes_match_whole_texts(name: str, pattern: str) -> None:
    try:
        grammar = compiled(spec(name, guided_regex=pattern))
    except ValueError as refused:
        assert str(refused) and pattern not in PATTERNS[:5]
        return
    if name == "lm-format-enforcer" and (pattern[:1] > "\x7f" or pattern[1:2] > "\x7f"):
        with pytest.raises(ValueError, match="no token"):  # characters of several tokens are none to it
            try_walk(grammar, demo_vocabulary().vocab_size)
        return
    for seed in range(6):
        text = walk(grammar, seed)
        assert text is None or re.fullmatch(pattern.replace("(?<year>", "(?P<year>"), text), text


@pytest.mark.parametrize("name", NAMES)
def test_choices(name: str) -> None:
    choices = ["Paris", "New York", "a|b*", "[x]{2}$", "\\d\n", "é", "a b"]
    grammar = compiled(spec(name, guided_choice=choices))
    found = {walk(grammar, seed) for seed in range(25)}
    assert found <= set(choices) and len(found) > 3


@pytest.mark.parametrize("grammar", ['root ::= "a " word\nword ::= [a-z]{1,4}', 'start: "a " WORD\nWORD: /[a-z]{1,4}/'])
def test_grammars_are_guidances(grammar: str) -> None:
    texts = [walk(compiled(spec("guidance", guided_grammar=grammar)), seed) for seed in range(5)]
    assert all(re.fullmatch("a [a-z]{1,4}", text) for text in texts)
    for name in ("outlines", "lm-format-enforcer"):
        with pytest.raises(ApiError, match="does not take grammar"):
            spec(name, guided_grammar=grammar)


@pytest.mark.parametrize("name", NAMES)
def test_whitespace_is_the_clients(name: str) -> None:
    fields = {"guided_json": PERSON, "structured_outputs": None, "guided_whitespace_pattern": r"\n?"}
    if name == "lm-format-enforcer":
        with pytest.raises(ApiError, match="whitespace"):
            spec(name, **fields)
        return
    texts = [walk(compiled(spec(name, **fields)), seed) for seed in range(4)]
    assert not any(re.search(r"[:,{] ", text) for text in texts if text)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("guidance", {"guided_json": {"not": {}}}), ("guidance", {"guided_regex": "(?=a)b"}),
        ("guidance", {"guided_grammar": "root ::= foo"}), ("outlines", {"guided_regex": "(?=a)b"}),
        ("outlines", {"guided_regex": "("}), ("lm-format-enforcer", {"guided_regex": "("}),
    ],
)  # fmt: skip
def test_what_does_not_compile_is_an_error(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        compiled(spec(name, **fields))
    assert not isinstance(caught.value, (ImportError, AttributeError, KeyError))


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_matchers_are_alike(name: str) -> None:
    """Forced tokens, drafts, endings and what is taken back: the masks of all backends are those of xgrammar."""
    vocabulary = demo_vocabulary()
    made = request_spec(GenerateRequest(guided_regex="1[2-3]4?x", guided_decoding_backend=name))
    ends = (*vocabulary.eos_token_ids, 3)
    params = SamplingParams(masked_eos_token_ids=ends[:1], stop_token_ids=ends[1:], grammar=made)
    state = GrammarState(compiled(made), params, vocabulary.vocab_size)
    one, two, four, end = (vocabulary.tokens.index(char) for char in (b"1", b"2", b"4", b"x"))

    def allowed(mask: np.ndarray) -> set[int]:
        return set(np.unpackbits(mask.view(np.uint8), bitorder="little")[: vocabulary.vocab_size].nonzero()[0].tolist())

    first = allowed(state.mask())
    assert {one} <= first <= {k for k, text in enumerate(vocabulary.tokens) if text in (b"1", b"12", b"13")}
    masks = [allowed(mask) for mask in state.masks([one, two, four, end])]
    assert {four, end} <= masks[2] and end in masks[3] and four not in masks[3] and masks[4] == set(ends)
    assert allowed(state.mask()) == first
    assert allowed(state.masks([end, one])[1]) == first  # a draft that may not come changes nothing
    state.advance([one, two, four])
    assert state.forced(15) == [end] and allowed(state.mask()) == {end}
    state.advance([end, ends[1]])
    assert state.matcher.is_terminated()


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_grammar_goes_to_another_process(name: str) -> None:
    made = request_spec(GenerateRequest(guided_regex="[ab]{2,9}c", guided_decoding_backend=name))
    backend = backends().get(name)
    grammar = backend.compile(made)
    again = backend.unpack(made, grammar.pack())
    assert [walk(again, seed) for seed in range(3)] == [walk(grammar, seed) for seed in range(3)]
    assert 0 < grammar.num_bytes < 10_000_000
