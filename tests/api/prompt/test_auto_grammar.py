"""Answers of strict tools under tool_choice auto: text is free, calls are valid from their marks on, in each format."""

from __future__ import annotations

import json
import random
from functools import cache

import numpy as np
import pytest
import xgrammar as xg
from jsonschema import Draft202012Validator
from tool_outputs import CALLS, TEXTS, WRITERS, Call, parse, schemas

from fuseline.api.errors import ApiError
from fuseline.api.parsers.choice import HARMONY, ParseSettings
from fuseline.api.parsers.formats import tool_formats
from fuseline.api.parsers.reasoning import reasoning_formats
from fuseline.api.prompt.auto_grammar import call_or_answer, strict_format, tag_spec
from fuseline.api.prompt.channels import channel_spec
from fuseline.api.prompt.grammar import json_spec
from fuseline.api.prompt.tool_grammar import tool_spec
from fuseline.api.prompt.tools import Tool, ToolUse

FORMS = tool_formats()
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
RICH = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["C", "F"]}, "count": {"type": "integer", "minimum": 1, "maximum": 30},
        "note": {"type": "string"},
        "code": {"type": "string", "pattern": "[a-c]{2,4}"}, "list": {"type": "array", "items": {"type": "boolean"}},
        "where": {"$ref": "#/$defs/w"}, "short": {"type": "string", "maxLength": 3},
    },
    "required": ["unit", "count"], "$defs": {"w": {"type": "object", "properties": {"x": {"type": "null"}}}},
}  # fmt: skip
END = 256


@cache
def compiler() -> xg.GrammarCompiler:
    vocabulary = [bytes([k]) for k in range(256)] + [b"</s>"]
    info = xg.TokenizerInfo(vocabulary, vocab_type=xg.VocabType.RAW, stop_token_ids=[END])
    return xg.GrammarCompiler(info, max_threads=1)


def matcher(form: dict) -> xg.GrammarMatcher:
    return xg.GrammarMatcher(compiler().compile_structural_tag({"type": "structural_tag", "format": form}))


def takes(form: dict, text: str) -> bool:
    found = matcher(form)
    return all(map(found.accept_token, text.encode())) and found.accept_token(END)


def tools(calls: list[Call]) -> list[Tool]:
    return [Tool(name, schema, is_strict=True) for name, schema in schemas(calls).items()]


@pytest.mark.parametrize("name", WRITERS)
def test_what_models_write_is_taken(name: str) -> None:
    for title, calls in CALLS.items():
        if title in ("three alike", "numbers"):
            continue
        calls = calls[:1] if FORMS[name].is_single else calls
        form = strict_format(FORMS[name], tools(calls))
        assert takes(form, WRITERS[name](calls)), title


@pytest.mark.parametrize("name", WRITERS)
def test_text_is_free(name: str) -> None:
    """Before, between and behind calls, and where there is none; a bare begin is a call in formats that say so."""
    form = strict_format(FORMS[name], [Tool("f", CITY, True)])
    for text in TEXTS:
        is_bare = bool(text.strip()) and text.strip()[0] in FORMS[name].bare
        assert takes(form, text) != is_bare, text
    output = WRITERS[name]([("f", {"city": "Paris"})])
    if not FORMS[name].bare:
        assert takes(form, "Let me see.\n" + output + "\nDone. " + output)


@pytest.mark.parametrize("name", WRITERS)
def test_arguments_that_are_not_valid_are_not_taken(name: str) -> None:
    strict, other = Tool("f", CITY, True), Tool("g", CITY)
    form = strict_format(FORMS[name], [strict, other])
    write = WRITERS[name]
    assert takes(form, write([("f", {"city": "x", "days": 3})]))
    for arguments in ({"days": 3}, {"city": "x", "days": "many"}, {"city": "x", "more": 1}):
        assert not takes(form, write([("f", arguments)])), arguments
        assert takes(form, write([("g", arguments)])), arguments
    assert not takes(form, write([("h", {"city": "x"})]))


def begin_of_call(name: str) -> str:
    return (*FORMS[name].opens, "")[0] if not FORMS[name].bare else ""


@pytest.mark.parametrize("name", WRITERS)
def test_each_call_that_is_let_through_is_valid(name: str) -> None:
    """Random answers from the mark on, read by the format's own parser."""
    form = strict_format(FORMS[name], [Tool("f", RICH, True), Tool("long.name_2", CITY, True)])
    settings = ParseSettings(tools={"f": RICH, "long.name_2": CITY}, choice="auto", format=FORMS[name])
    num_calls = 0
    for seed in range(8):
        text = random_call(form, begin_of_call(name) or FORMS[name].bare[0], seed)
        found = parse([text], settings)
        for called, arguments in found.calls:
            Draft202012Validator(RICH if called == "f" else CITY).validate(json.loads(arguments))
        assert found.calls, text
        num_calls += len(found.calls)
    assert num_calls >= 8


WORD = {"type": "string"}

def fields(*required: str, properties: dict, **more: object) -> dict:
    return {"type": "object", "properties": properties, "required": list(required), **more}


AB = {"a": WORD, "b": WORD}
INNER = fields("b", properties={"b": {"type": "string", "maxLength": 4}}, additionalProperties={"type": "boolean"})
ITSELF = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
HARD = {
    "one of two": fields(properties=AB, anyOf=[{"required": ["a"]}, {"required": ["b"]}]),
    "counted": fields(properties={**AB, "c": {"type": "null"}}, minProperties=2),
    "marks": fields("a", properties={"a": {"enum": ["</parameter>", '<|"|>', "it's", "\n x"]}}),
    "mixed": fields("a", properties={"a": {"enum": ["x", 1, None, True]}}),
    "text or number": fields(properties={"a": {"type": ["string", "integer"], "maxLength": 2}}),
    "two bounds": fields("a", properties={"a": {"type": "string", "pattern": "[a-z<>/&]{3,40}", "maxLength": 40}}),
    "odd names": fields("a-b", properties={"a-b": WORD, "x>y": WORD, "": WORD, "}": {"type": "null"}}),
    "or nothing": {**fields("a", properties={"a": {"type": "integer"}}), "type": ["object", "null", "string"]},
    "itself": fields("n", properties={"n": {"type": "integer"}, "next": ITSELF}),
    "reference": {"$ref": "#/$defs/x", "$defs": {"x": CITY}},
    "others": fields(properties={"a": WORD}, additionalProperties={"type": "integer"}),
    "deep": fields("a", properties={"a": INNER}),
    "constants": fields("a", properties={"a": {"enum": [{"k": [True, None, "it's"]}, [1.5, "x"]]}}),
}
"""Schemas that a format either holds or refuses by name."""


@pytest.mark.parametrize("name", WRITERS)
def test_hard_schemas_are_held_or_refused(name: str) -> None:
    is_json = bool(FORMS[name].frame[0])
    for title, schema in HARD.items():
        try:
            form = strict_format(FORMS[name], [Tool("f", schema, True)])
        except ApiError as refused:
            assert refused.status == 400 and refused.param == "tools" and not is_json, title
            continue
        settings = ParseSettings(tools={"f": schema}, choice="auto", format=FORMS[name])
        for seed in range(2):
            text = random_call(form, begin_of_call(name) or FORMS[name].bare[0], seed)
            found = parse([text], settings)
            assert found.calls and not found.content, (title, text)
            for _, arguments in found.calls:
                Draft202012Validator(schema).validate(json.loads(arguments))
                assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize("name", WRITERS)
def test_text_that_ends_a_value_never_stands_in_one(name: str) -> None:
    """What the grammar takes is what the parser finds: marks within strings and lists of strings."""
    form, schema = FORMS[name], {
        "type": "object", "properties": {"a": {"type": "array", "items": WORD}, "b": WORD}, "required": ["a"],
    }  # fmt: skip
    held = strict_format(form, [Tool("f", schema, True)])
    settings = ParseSettings(tools={"f": schema}, choice="auto", format=form)
    num_taken = 0
    for mark in (*form.marks, "plain", "</", "<", "'\"'"):
        for arguments in ({"a": [mark]}, {"a": [f"x{mark}", mark]}, {"a": [], "b": f"x{mark}y"}):
            text = WRITERS[name]([("f", arguments)])
            if takes(held, text):
                num_taken += 1
                assert [(called, json.loads(given)) for called, given in parse([text], settings).calls] == [
                    ("f", arguments)
                ]
    assert num_taken >= 3


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_behind_a_call_is_another_one(name: str) -> None:
    """Without its mark what follows a call is free text, so no parser may take it for a call."""
    form, write = strict_format(FORMS[name], [Tool("f", CITY, True)]), WRITERS[name]
    settings = ParseSettings(tools={"f": CITY}, choice="auto", format=FORMS[name])
    good, bad = (write([("f", arguments)]) for arguments in ({"city": "x"}, {"city": "x", "no": 1}))
    for mark in FORMS[name].marks:
        bad = bad.replace(mark, "")
    for text in (good + between + bad for between in ("", " ", "\n", ", ", "; ")):
        if takes(form, text):
            assert [json.loads(arguments) for _, arguments in parse([text], settings).calls] == [{"city": "x"}], text


@pytest.mark.parametrize("name", WRITERS)
def test_names_that_a_format_cannot_write_are_refused(name: str) -> None:
    for called in ("f", "é", "a b", "1f", "x{y", "x>y", 'q"r', " f", "a.b-c", "f\ng", "x(y"):
        try:
            form = strict_format(FORMS[name], [Tool(called, CITY, True)])
        except ApiError as refused:
            assert refused.param == "tools" and called != "f"
            continue
        text = random_call(form, begin_of_call(name) or FORMS[name].bare[0], 1)
        settings = ParseSettings(tools={called: CITY}, choice="auto", format=FORMS[name])
        assert parse([text], settings).calls[0][0] == called, text


def test_forced_arguments_are_an_object() -> None:
    """Also by a schema that takes other values: a list of calls has no other arguments."""
    either = {"type": ["object", "null"], "properties": {"a": {"type": "null"}}, "required": ["a"]}
    for choice, wrap in (("required", '[{"name": "f", "parameters": %s}]'), ("named", "%s")):
        spec = tool_spec(ToolUse(choice, (Tool("f", either),)))
        form = {"type": "grammar", "grammar": spec.text}
        assert takes(form, wrap % '{"a": null}') and not takes(form, wrap % "null") and not takes(form, wrap % "{}")


CLOSERS = ('"', "}", "]", ")", "'", '<|"|>', "<escape>", "</parameter>", "</arg_value>", "</steptml:parameter>")


def random_call(form: dict, begin: str, seed: int) -> str:
    """A text of the grammar behind `begin`, up to where it may end."""
    found, rng, text = matcher(form), random.Random(seed), begin.encode()
    assert found.accept_string(begin)
    mask = xg.allocate_token_bitmask(1, END + 1)
    while not found.is_completed():
        found.fill_next_token_bitmask(mask)
        allowed = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[:END].nonzero()[0].tolist()
        closer = rng.choice(CLOSERS)
        if ord(closer[0]) in allowed and rng.random() < 0.5 and found.accept_string(closer):
            text += closer.encode()
            continue
        byte = rng.choice([byte for byte in allowed if byte < 128] or allowed)
        assert found.accept_token(byte)
        text += bytes([byte])
        assert len(text) < 5000, text
    return text.decode()


@pytest.mark.parametrize("name", WRITERS)
def test_a_call_or_an_answer_by_the_schema(name: str) -> None:
    answer = json_spec({"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]})
    form = call_or_answer(FORMS[name], [Tool("f", CITY, True)], answer)
    assert takes(form, '{"sum": 3}') and takes(form, WRITERS[name]([("f", {"city": "Paris"})]))
    for text in ("", "Hello.", '{"sum": "3"}', '{"sum": 3} and text', "Let me see. " + WRITERS[name]([("f", {})])):
        assert not takes(form, text), text
    assert not takes(form, WRITERS[name]([("f", {"city": 3 if name not in ("qwen3_coder",) else "x", "no": 1})]))


@pytest.mark.parametrize("name", ["qwen3_coder", "glm45", "minimax_m2", "step3"])
def test_schemas_that_tags_cannot_hold_are_refused_by_name(name: str) -> None:
    either = {"type": "object", "properties": {"a": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}}}
    for schema in (either, {"$ref": "#/$defs/x", "$defs": {"x": CITY}}, {"type": "object", "required": ["a"]}):
        with pytest.raises(ApiError, match="strict is not possible") as refused:
            strict_format(FORMS[name], [Tool("f", schema, True)])
        assert refused.value.param == "tools"
        assert strict_format(FORMS[name], [Tool("f", schema)]) is not None


CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"city": "Paris"}'
THOUGHT = "<|channel|>analysis<|message|>Hm < 3. {}<|end|><|start|>assistant"
HARMONY_SETTINGS = {"tools": {"f": CITY}, "format": HARMONY, "reasoning": HARMONY}


@pytest.mark.parametrize("choice", ["required", "named"])
def test_forced_calls_of_harmony_stand_in_their_channel(choice: str) -> None:
    form = json.loads(channel_spec(ToolUse(choice, (Tool("f", CITY),)), None, False, []).text)["format"]
    for text in (
        CALL,
        THOUGHT + CALL,
        CALL.replace("<|channel|>commentary to=functions.f", " to=functions.f<|channel|>commentary"),
    ):
        assert takes(form, text), text
        found = parse([text], ParseSettings(choice=choice, named="f", **HARMONY_SETTINGS))
        assert found.calls == [("f", '{"city": "Paris"}')] and not found.content
        assert found.reasoning == ("Hm < 3. {}" if text.startswith(THOUGHT) else "")
    for text in ('{"city": "Paris"}', "Hello.", THOUGHT, CALL.replace("city", "town"), THOUGHT + THOUGHT + CALL):
        assert not takes(form, text), text


def test_names_that_a_header_of_harmony_cannot_hold_are_refused() -> None:
    for called in ("a b", "x<y", "f\n"):
        with pytest.raises(ApiError, match="cannot be called") as refused:
            channel_spec(ToolUse("required", (Tool(called, CITY),)), None, False, [])
        assert refused.value.param == "tools"
    form = json.loads(channel_spec(ToolUse("required", (Tool("server/f:é", CITY),)), None, False, []).text)["format"]
    text = CALL.replace("functions.f", "functions.server/f:é")
    settings = ParseSettings(choice="required", **{**HARMONY_SETTINGS, "tools": {"server/f:é": CITY}})
    assert takes(form, text) and parse([text], settings).calls == [("server/f:é", '{"city": "Paris"}')]


def test_answers_of_harmony_by_a_grammar_stand_in_the_final_channel() -> None:
    answer, final = (
        json_spec({"type": "object", "properties": {"n": {"type": "integer"}}}),
        "<|channel|>final<|message|>",
    )
    alone = json.loads(channel_spec(ToolUse(), answer, True, []).text)["format"]
    with_tools = json.loads(channel_spec(ToolUse("auto", (Tool("f", CITY, True),)), answer, True, []).text)["format"]
    for form in (alone, with_tools):
        assert takes(form, final + '{"n": 3}') and takes(form, THOUGHT + final + '{"n": 3}')
        assert not takes(form, '{"n": 3}') and not takes(form, final + "Hello.")
    assert takes(with_tools, THOUGHT + CALL) and not takes(alone, THOUGHT + CALL)
    assert not takes(with_tools, CALL.replace("city", "town"))


def test_strict_calls_of_harmony() -> None:
    spec = channel_spec(ToolUse("auto", (Tool("f", CITY, True), Tool("fg", None))), None, False, [(7, "<|call|>")])
    form = json.loads(spec.text)["format"]
    for text in (
        CALL,
        THOUGHT + CALL + "<|call|>",
        THOUGHT + "<|channel|>final<|message|>Hi.",
        CALL.replace(".f ", ".fg ").replace("city", "x"),
    ):
        assert takes(form, text), text
    assert not takes(form, CALL.replace("city", "town")) and spec.is_free and spec.spelled == ((7, "<|call|>"),)
    assert channel_spec(ToolUse("auto", (Tool("f", CITY),)), None, False, []) is None


def test_reasoning_may_come_first() -> None:
    from fuseline.api.prompt.auto_grammar import behind_reasoning

    class NoMarks:
        added_tokens: dict[str, bool] = {}

    form = strict_format(FORMS["hermes"], [Tool("f", CITY, True)])
    good, bad = (WRITERS["hermes"]([("f", arguments)]) for arguments in ({"city": "x"}, {"town": "x"}))
    for name in ("qwen3", "granite", "kimi", "magistral"):
        thinks = reasoning_formats()[name]
        made = behind_reasoning(tag_spec(form, (), is_free=True), thinks, NoMarks())
        assert made.is_free
        found, thought = json.loads(made.text)["format"], f"{thinks.begins[0]}a {bad} b{thinks.ends[0]}"
        assert takes(found, thought + "Hi. " + good) and takes(found, good) and takes(found, "Hi.")
        assert not takes(found, thought + bad) and not takes(found, bad)
        opened = json.loads(behind_reasoning(tag_spec(form, (), True), thinks, NoMarks(), is_open=True).text)["format"]
        assert takes(opened, f"{bad}{thinks.ends[0]}{good}") and not takes(opened, f"x{thinks.ends[0]}{bad}")
