"""Every text of a schema's grammar is valid under the schema; what cannot be enforced is refused by name."""

from __future__ import annotations

import json
import re

import pytest
from grammar_walk import compiled, walk
from jsonschema import Draft202012Validator
from schema_cases import LEAVES, REFUSED, REGEXES, schemas

from fuseline.api.errors import ApiError
from fuseline.api.prompt.grammar import json_spec, request_spec
from fuseline.api.protocol.chat import ChatRequest


def faults(schema: dict, seeds: int) -> list[str]:
    grammar = compiled(json_spec(schema))
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    texts = [walk(grammar, seed) for seed in range(seeds)]
    assert any(text is not None for text in texts)
    return [f"{text}: {error.message}" for text in texts if text for error in validator.iter_errors(json.loads(text))]


@pytest.mark.parametrize("schema", LEAVES, ids=json.dumps)
def test_keyword_by_keyword(schema):
    assert faults(schema, 6) == []


@pytest.mark.slow
def test_three_hundred_schemas():
    found = {json.dumps(schema): wrong for schema in schemas() if (wrong := faults(schema, 5))}
    assert found == {}


def test_some_combinations():
    found = {json.dumps(schema): wrong for schema in schemas()[len(LEAVES) :: 9] if (wrong := faults(schema, 3))}
    assert found == {}


@pytest.mark.parametrize(("schema", "word"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_enforced_is_refused_by_name(schema, word):
    for nested in (schema, {"type": "object", "properties": {"a": schema}, "required": ["a"]}):
        if "$ref" in schema and nested is not schema:
            continue
        with pytest.raises(ApiError) as refused:
            json_spec(nested)
        assert refused.value.status == 400 and word in refused.value.message


@pytest.mark.parametrize("regex", REGEXES)
def test_texts_of_a_regex_match_it(regex):
    body = ChatRequest(messages=[{"role": "user", "content": "x"}], guided_regex=regex)
    grammar = compiled(request_spec(body))
    python = regex.replace("(?<year>", "(?P<year>")
    texts = [walk(grammar, seed) for seed in range(8)]
    assert any(texts)
    for text in texts:
        assert text is None or re.fullmatch(python, text)
