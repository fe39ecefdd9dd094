"""Structured output over the server's application: each form of a request, and what wins against a grammar."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_client import MESSAGES, Api
from jsonschema import Draft202012Validator

from fuseline.api.errors import ApiError
from fuseline.api.prompt import backends
from fuseline.api.prompt.backends import PACKAGES

CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "a_key_that_is_long_enough_to_be_several_tokens": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["city", "country"]},
    },
    "required": ["name", "a_key_that_is_long_enough_to_be_several_tokens", "kind"],
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    server = Api()
    yield server
    server.close()


def texts(api: Api, **fields) -> list[str]:
    """Texts of the choices, all of which must have ended by themselves."""
    answer = api.answer(CHAT, messages=MESSAGES, max_tokens=300, **{"temperature": 1, "seed": 3, **fields})
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    return [choice["message"]["content"] for choice in answer["choices"]]


def refusal(api: Api, **fields) -> str:
    response = api.post(CHAT, {"model": "demo", "messages": MESSAGES, "max_tokens": 30, **fields})
    assert response.status_code == 400, response.text
    return response.json()["error"]["message"]


def is_valid(text: str) -> bool:
    return Draft202012Validator(SCHEMA).is_valid(json.loads(text))


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": JSON_SCHEMA}, {"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        {"guided_json": SCHEMA, "guided_whitespace_pattern": r"[\n ]?"},
        {"response_format": JSON_SCHEMA, "n": 3}, {"response_format": JSON_SCHEMA, "n": 2, "temperature": 0},
        {"response_format": JSON_SCHEMA, "ignore_eos": True, "min_tokens": 100},
        {"response_format": JSON_SCHEMA, "stop": ['"', "}"]},
        {"response_format": JSON_SCHEMA, "logit_bias": {str(token): 100 for token in range(40)}},
        {"response_format": JSON_SCHEMA, "repetition_penalty": 1.5, "presence_penalty": 1.5, "top_k": 3},
        {"response_format": JSON_SCHEMA, "stop_token_ids": list(range(60, 70))},
        {"response_format": JSON_SCHEMA, "guided_decoding_backend": "outlines"},
    ],
    ids=str,
)  # fmt: skip
def test_json_is_valid_whatever_else_is_asked(api, fields):
    assert all(is_valid(text) for text in texts(api, **fields))


def test_other_forms(api):
    assert texts(api, guided_choice=["Paris", "New York"])[0] in ("Paris", "New York")
    assert re.fullmatch(r"\d{3}-[a-z]{1,9}", texts(api, guided_regex=r"\d{3}-[a-z]{1,9}")[0])
    assert isinstance(json.loads(texts(api, response_format={"type": "json_object"}, temperature=0)[0]), dict)
    gbnf, lark = 'root ::= "a " [a-z]{1,4}', 'start: "a " WORD\nWORD: /[a-z]{1,4}/'
    for grammar in (gbnf, lark):
        assert re.fullmatch("a [a-z]{1,4}", texts(api, guided_grammar=grammar)[0])
    content = {"type": "json_schema", "json_schema": SCHEMA}
    tag = {"format": {"type": "tag", "begin": "<f>", "content": content, "end": "</f>"}}
    text = texts(api, response_format={"type": "structural_tag", **tag})[0]
    assert is_valid(text.removeprefix("<f>").removesuffix("</f>"))


@pytest.mark.parametrize("name", ["guidance", "outlines", "lm-format-enforcer"])
def test_packages_serve_requests(api, name):
    """The same request gives the same answer each time, streamed or not, alone or with company."""
    backend = {"guided_decoding_backend": f"{name}:no-fallback"}
    properties = {"a": {"enum": ["x", "yz"]}, "n": {"type": "integer"}}
    plain = {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    assert set(texts(api, guided_choice=["Paris", "New York"], n=3, **backend)) <= {"Paris", "New York"}
    assert re.fullmatch(r"\d{3}-[a-z]{1,9}", texts(api, guided_regex=r"\d{3}-[a-z]{1,9}", **backend)[0])
    fields = {"structured_outputs": {"json": plain, "backend": f"{name}:no-fallback"}}
    found = texts(api, n=3, **fields)
    assert all(Draft202012Validator(plain).is_valid(json.loads(text)) for text in found)
    chunks = api.stream(CHAT, messages=MESSAGES, max_tokens=300, temperature=1, seed=3, **fields)
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == found[0]


@pytest.mark.parametrize("name", ["guidance", "outlines", "lm-format-enforcer"])
def test_a_missing_package_is_named_with_its_cure(name, monkeypatch, caplog):
    module = PACKAGES[name].module
    monkeypatch.setattr(backends, "find_spec", lambda asked: None if asked == module else pytest.fail(asked))
    cure = f"pip install 'fuseline[{PACKAGES[name].extra}]'"
    assert backends.choose_backend(name, "regex", "a", False, "field") == "xgrammar" and cure in caplog.text
    with pytest.raises(ApiError) as refused:
        backends.choose_backend(f"{name}:no-fallback", "regex", "a", False, "field")
    assert refused.value.status == 400 and cure in refused.value.message
    caplog.clear()
    backends.check_installed(name)
    assert cure in caplog.text
    with pytest.raises(ValueError, match="is not installed: pip install"):
        backends.check_installed(f"{name}:no-fallback")


def test_the_extras_are_those_that_errors_name():
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for package in PACKAGES.values():
        (requirement,) = extras[package.extra]
        assert requirement in extras["test"]


def test_streamed_equals_whole(api):
    chunks = api.stream(CHAT, messages=MESSAGES, max_tokens=300, temperature=1, seed=3, response_format=JSON_SCHEMA)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert text == texts(api, response_format=JSON_SCHEMA)[0]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"guided_choice": ["a"], "guided_regex": "a"}, "You can only use one kind of guided decoding"),
        ({"guided_json": {"not": {}}}, "not"), ({"guided_json": "{"}, "no valid JSON"),
        ({"guided_json": 3}, "guided_json"), ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "("}, "guided_regex"), ({"guided_regex": ""}, "guided_regex"),
        ({"guided_grammar": "root ::= foo"}, "foo"), ({"guided_grammar": "hello"}, "no rule"),
        ({"guided_choice": ["a"], "guided_decoding_backend": "zz"}, "unknown backend"),
        ({"guided_choice": ["a"], "guided_decoding_backend": "xgrammar:fast"}, "unknown option"),
        ({"guided_choice": ["a"], "guided_decoding_backend": "outlines:slow"}, "unknown option"),
        (
            {"guided_grammar": 'root ::= "a"', "guided_decoding_backend": "outlines:no-fallback"},
            "outlines cannot be used here, and no-fallback excludes xgrammar: it does not take grammar",
        ),
        ({"guided_regex": "(?=a)b", "guided_decoding_backend": "guidance"}, "look-around"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"), ({"response_format": {"type": "xml"}}, "xml"),
        ({"structured_outputs": {}}, "structured_outputs"), ({"structured_outputs": {"jso": {}}}, "jso"),
        ({"guided_json": {}, "guided_whitespace_pattern": "x"}, "guided_whitespace_pattern"),
        ({"guided_choice": ["Paris"], "allowed_token_ids": [5]}, "no token is left"),
        ({"response_format": {"type": "structural_tag", "format": {"type": "zz"}}}, "structural"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_say_what_is_wrong(api, fields, word):
    assert word in refusal(api, **fields)


def test_forced_text_gives_the_same_tokens(api):
    """A server that schedules ahead takes no forced tokens at once: what it gives is masked token by token."""
    plain = Api(async_scheduling=True)
    try:
        for seed in range(4):
            fields = {"response_format": JSON_SCHEMA, "seed": seed, "n": 2, "return_token_ids": True, "logprobs": True}
            ours, theirs = (
                server.answer(CHAT, messages=MESSAGES, max_tokens=200, temperature=1, **fields)["choices"]
                for server in (api, plain)
            )
            assert [choice["token_ids"] for choice in ours] == [choice["token_ids"] for choice in theirs]
            assert [choice["logprobs"] for choice in ours] == [choice["logprobs"] for choice in theirs]
    finally:
        plain.close()


def test_a_grammar_with_long_counts_is_served(api):
    """GBNF of users is compiled as it is: masks within a long count take long, and no step waits for them."""
    for grammar in ('root ::= [a-f]{40,120} "."', 'start: LETTER~40..120 "."\nLETTER: /[a-f]/'):
        assert re.fullmatch(r"[a-f]{40,120}\.", texts(api, guided_grammar=grammar, n=2)[0])
