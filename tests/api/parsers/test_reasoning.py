"""Every reasoning format: whole, letter by letter, and in any two pieces, alone and in front of tool calls."""

from __future__ import annotations

import json

import pytest
from tool_outputs import Found, every_split, parse

from fuseline.api.parsers.choice import HARMONY, ParseSettings
from fuseline.api.parsers.formats import tool_formats
from fuseline.api.parsers.reasoning import FORMATS, ReasoningFormat, reasoning_formats

FORMS = reasoning_formats()
HERMES = tool_formats()["hermes"]
THOUGHTS = (
    "I think.", "\nOne line.\nTwo.\n", "é 日本 🎉", "a < b and <b>", '{"a": [1]}', "half a </thin", "[/THIN", "<thin",
    "  blank  ", "Here is my", "\\n \\u00e9", "'quoted' \"text\"", "tabs\tand\r\n", "-" * 50, "<|im_en", "◁/thin", ".",
)  # fmt: skip
CALL = '<tool_call>{"name": "f", "arguments": {"a": "x"}}</tool_call>'


def settings(form: ReasoningFormat, **more) -> ParseSettings:
    return ParseSettings(reasoning=form, **more)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.names[0])
def test_reasoning_and_answer(form: ReasoningFormat) -> None:
    begin, end = form.begins[0], form.ends[0]
    for thought in THOUGHTS:
        for answer in ("", "\n\nThe answer is 12 <b>.", begin + " again " + end):
            found = every_split(begin + thought + end + answer, settings(form))
            assert found == Found(answer, thought), (thought, answer)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.names[0])
def test_without_the_first_mark(form: ReasoningFormat) -> None:
    """The template may have written it; otherwise the format decides."""
    end = form.ends[0]
    text = f"I think.{end}Yes."
    opened = every_split(text, settings(form, start="open"))
    assert opened == Found("Yes.", "I think.")
    assert every_split("Yes.", settings(form, start="closed")) == Found("Yes.")
    assert every_split(text, settings(form)) == (opened if form.is_assumed else Found(text))
    assert every_split("", settings(form)) == Found()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.names[0])
def test_reasoning_that_does_not_end(form: ReasoningFormat) -> None:
    assert every_split(form.begins[0] + "I think", settings(form)) == Found("", "I think")
    assert every_split("I think", settings(form)) == (Found("", "I think") if form.is_assumed else Found("I think"))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.names[0])
def test_calls_are_read_behind_the_reasoning_only(form: ReasoningFormat) -> None:
    text = form.begins[0] + "I could " + CALL + form.ends[0] + "\n" + CALL
    found = every_split(text, settings(form, choice="auto", format=HERMES))
    assert found == Found("", "I could " + CALL, [("f", '{"a": "x"}')])


@pytest.mark.parametrize(
    ("choice", "rest"), [("named", '{"a": 1}'), ("required", '[{"name": "f", "parameters": {"a": 1}}]')]
)
def test_chosen_tools_behind_reasoning(choice: str, rest: str) -> None:
    chosen = settings(FORMS["qwen3"], choice=choice, named="f", tools={"f": None})
    found = every_split("<think>Hm.</think>" + rest, chosen)
    assert found == Found("", "Hm.", [("f", '{"a": 1}')])


def test_what_stands_around_the_answer_is_dropped() -> None:
    text = "<think>\nHm.\n</think>\n<answer>\nYes.\n</answer>"
    assert every_split(text, settings(FORMS["hunyuan_a13b"])) == Found("\n\nYes.\n", "\nHm.\n")


def test_calls_end_reasoning_that_has_no_end() -> None:
    call = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    kimi = settings(FORMS["kimi_k2"], choice="auto", format=tool_formats()["kimi_k2"])
    assert every_split("Hm." + call, kimi) == Found("", "Hm.", [("f", "{}")])


def test_the_end_of_the_prompt_tells_where_the_answer_begins() -> None:
    form = FORMS["qwen3"]
    assert form.start("<|im_start|>assistant\n<think>\n") == "open"
    assert form.start("<|im_start|>assistant\n<think>\n\n</think>\n\n") == "closed"
    assert form.start("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n") == ""
    assert [form.start_within(text) for text in ("<think>a", "<think>a</think>b", "b")] == ["open", "closed", ""]


HARMONY_CASES = {
    "<|channel|>final<|message|>Hello.": Found("Hello."),
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.": Found("Yes.", "Hm."),
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
    '<|constrain|>json<|message|>{"a":"<|end|> é"}<|call|>': Found("", "Hm.", [("f", '{"a": "<|end|> é"}')]),
    '<|channel|>commentary to=functions.f<|message|>{}<|call|><|start|>assistant<|channel|>commentary to=functions.g '
    '<|message|>{"b": [1, {"c": null}]}': Found("", "", [("f", "{}"), ("g", '{"b": [1, {"c": null}]}')]),
    ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>': Found("", "", [("f", '{"a": 1}')]),
    "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant to=functions.f<|channel|>commentary"
    "<|message|>{}": Found("Let me look.", "", [("f", "{}")]),
    "<|channel|>commentary to=functions.f<|message|>no JSON<|call|>": Found("no JSON"),
    "<|channel|>analysis<|message|>Cut sho": Found("", "Cut sho"),
    "<|channel|>analysis to=python<|message|>print(1)<|call|>": Found("", "print(1)"),
    "Plain text <b> and é.": Found("Plain text <b> and é."),
    "": Found(),
    "<|channel|>fin": Found(),
    '<|channel|>commentary to=functions.f<|message|>{"a": 1': Found("", "", [("f", '{"a": ')]),
}  # fmt: skip


def test_harmony() -> None:
    for text, truth in HARMONY_CASES.items():
        assert every_split(text, ParseSettings(choice="auto", format=HARMONY, reasoning=HARMONY)) == truth, text


def test_harmony_without_tools_calls_none() -> None:
    text = "<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    assert parse([text], ParseSettings(reasoning=HARMONY)) == Found("", "{}")


FORCED = {
    None: ' [{"name": "f", "parameters": {"city": "Zürich", "days": [1, 2]}}, {"name": "g", "parameters": {}}]',
    HARMONY: "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    '{"city": "Zürich", "days": [1, 2]}<|call|>',
}


@pytest.mark.parametrize("form", FORCED, ids=str)
@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_forced_call_that_is_cut_is_never_content(form: str | None, choice: str) -> None:
    if form is None and choice == "named":
        text = '{"city": "Zürich", "days": [1, 2]}'
    else:
        text = FORCED[form]
    settings = ParseSettings(tools={"f": {}, "g": {}}, choice=choice, named="f", format=form)
    whole = parse([text], settings).calls[0][1]
    assert json.loads(whole) == {"city": "Zürich", "days": [1, 2]}
    for length in range(len(text) + 1):
        for pieces in ([text[:length]], list(text[:length])):
            found = parse(pieces, settings)
            assert found.content == "" and all(whole.startswith(arguments) for _, arguments in found.calls[:1]), length
