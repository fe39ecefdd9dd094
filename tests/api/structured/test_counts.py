"""Counts that no backend can hold are refused by their digits, wherever they stand; what looks like one is text."""

from __future__ import annotations

from typing import Any

import pytest
from prompt_cases import body, preparer

from fuseline.api.prompt.prepare import Preparer
from fuseline.api.prompt.prepared import Refused
from fuseline.api.structured.counts import MAX_COUNT

BIG = (MAX_COUNT + 1, 99999999999, 10**12, 2**63 - 1)
BACKENDS = ("xgrammar", "outlines", "lm-format-enforcer", "guidance")
TEXTS: dict[str, tuple[str, ...]] = {
    "guided_regex": ("a{%d}", "a{0,%d}", "(ab){%d,}", "([x]{2}){1,3}b{ %d }", r"\\{2}c{%d}"),
    "guided_grammar": (
        'root ::= "a"{%d}', 'root ::= "a" | b{0,%d}\nb ::= "b"', 'root ::= [{x]{%d,}', 'start: "a"~%d',
        'start: "a"~1..%d', 'start: "a"{2,%d}', 'start: /b"{1,%d}/ "a"',
    ),
}  # fmt: skip
ALIKE: dict[str, tuple[str, ...]] = {
    "guided_regex": (r"\{%d\}", "[{%d}]", "[^{%d}a]x", "a%d"),
    "guided_grammar": (
        'root ::= "{%d}"', "root ::= [{%d}]", 'root ::= "a" # {%d}', 'start: "~%d"', 'start: "a" // ~%d\n',
    ),
}  # fmt: skip
SCHEMAS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("minItems", {"type": "array", "items": {"type": "integer"}}), ("maxItems", {"type": "array"}),
    ("minLength", {"type": "string"}), ("maxLength", {"type": "string"}),
    ("maxProperties", {"type": "object", "additionalProperties": {"type": "integer"}}),
    ("minProperties", {"type": "object"}),
)  # fmt: skip


@pytest.fixture(scope="module")
def own() -> Preparer:
    return preparer(reasoning_parser="qwen3", enable_auto_tool_choice=True, tool_call_parser="hermes")


def reply(own: Preparer, **fields: Any) -> Any:
    return own.prepare("completion", body(prompt="a", **fields))


def check_refused(found: Any, *words: str) -> None:
    assert isinstance(found, Refused) and found.status == 400, found
    assert all(word in found.message for word in words), found.message


@pytest.mark.parametrize(("field", "text"), [(field, text) for field, texts in TEXTS.items() for text in texts])
def test_counts_in_texts(own: Preparer, field: str, text: str) -> None:
    for big in BIG:
        for backend in BACKENDS:
            found = reply(own, **{field: text % big, "guided_decoding_backend": backend})
            check_refused(found, str(big), field)
    check_refused(reply(own, **{field: text.replace("%d", "9" * 5000)}), "9" * 40 + "...")


@pytest.mark.parametrize(("field", "text"), [(field, text) for field, texts in ALIKE.items() for text in texts])
def test_what_looks_like_a_count_is_text(own: Preparer, field: str, text: str) -> None:
    assert not isinstance(reply(own, **{field: text % 10**12}), Refused)


@pytest.mark.parametrize(("keyword", "schema"), SCHEMAS, ids=lambda value: value if isinstance(value, str) else "")
def test_counts_in_schemas(own: Preparer, keyword: str, schema: dict[str, Any]) -> None:
    for big in (*BIG, 1e12, -1, 2.5):
        whole = {**schema, keyword: big}
        nested = {"type": "object", "properties": {"a": {"type": "array", "items": whole}}, "required": ["a"]}
        for backend in BACKENDS:
            for one in (whole, nested):
                check_refused(reply(own, guided_json=one, guided_decoding_backend=backend), keyword)
        tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": whole}}
        check_refused(reply(own, response_format=tag), keyword)
    named = {"type": "object", "properties": {keyword: {"type": "integer"}}, "required": [keyword]}
    assert not isinstance(reply(own, guided_json=named, guided_decoding_backend="outlines"), Refused)


def test_counts_elsewhere(own: Preparer) -> None:
    big, pattern = str(10**12), "^a{1000000000000}$"
    for backend in BACKENDS:
        schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}
        check_refused(reply(own, guided_json=schema, guided_decoding_backend=backend), big)
    for inner in ({"type": "regex", "pattern": pattern}, {"type": "grammar", "grammar": f'root ::= "a"{{{big}}}'}):
        check_refused(reply(own, response_format={"type": "structural_tag", "format": inner}), big)
    check_refused(reply(own, guided_json={}, guided_whitespace_pattern=f"[ ]{{0,{big}}}"), big)
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 10**12}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    fields = {"messages": [{"role": "user", "content": "a"}], "tools": [tool], "tool_choice": "required"}
    check_refused(own.prepare("chat", body(**fields)), big, "maxLength")
