"""Every tool format on outputs as its models write them: whole, letter by letter, and in any two pieces."""

from __future__ import annotations

import json

import pytest
from tool_outputs import BARE_KEYS, CALLS, TAGGED, TEXTS, WRITERS, Call, Found, every_split, parse, schemas

from fuseline.api.parsers.choice import ParseSettings
from fuseline.api.parsers.formats import FORMATS, ToolFormat, tool_formats

FORMS = tool_formats()
BY_FORM = {form.names[0]: form for form in FORMATS}


def settings(form: ToolFormat, calls: list[Call] = (), **more) -> ParseSettings:
    return ParseSettings(tools=schemas(calls), choice="auto", format=form, **more)


def written(calls: list[Call]) -> list[tuple[str, str]]:
    """As the client gets them."""
    return [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]


def test_every_format_has_a_writer() -> None:
    assert set(WRITERS) == set(BY_FORM)


@pytest.mark.parametrize("name", WRITERS)
def test_calls(name: str) -> None:
    form = FORMS[name]
    for title, calls in CALLS.items():
        calls = calls[:1] if form.is_single else calls
        found = every_split(WRITERS[name](calls), settings(form, calls))
        assert (title, found.calls, found.content) == (title, written(calls), "")


@pytest.mark.parametrize("name", WRITERS)
def test_plain_text_is_content(name: str) -> None:
    form = FORMS[name]
    for text in TEXTS:
        assert every_split(text, settings(form)) == Found(text), (name, text)


@pytest.mark.parametrize("name", WRITERS)
def test_marks_inside_of_strings_are_text(name: str) -> None:
    form = FORMS[name]
    marks = [mark for mark in form.marks if name not in TAGGED or mark in form.opens]
    quote = getattr(form.read, "quote", None)
    for mark in marks:
        if mark != quote:
            calls = [("f", {"a": f"x{mark}y", "b": "z"})]
            found = every_split(WRITERS[name](calls), settings(form, calls))
            assert (found.calls, found.content) == (written(calls), ""), mark


@pytest.mark.parametrize("name", WRITERS)
def test_text_around_calls(name: str) -> None:
    """Text before the first call is content, blanks alone are not, and what follows a call is dropped."""
    form, calls = FORMS[name], CALLS["simple"]
    output = WRITERS[name](calls)
    blank = every_split("\n " + output + "\n", settings(form, calls))
    assert (blank.calls, blank.content) == (written(calls), "")
    behind = every_split(output + "\nDone, I think.", settings(form, calls))
    assert (behind.calls, behind.content) == (written(calls), "")
    if form.is_first or not form.opens or name == "xlam":
        assert every_split("Let me see. " + output, settings(form, calls)).calls == []
    else:
        before = every_split("Let me see.\n" + output, settings(form, calls))
        assert (before.calls, before.content) == (written(calls), "Let me see.\n")


@pytest.mark.parametrize("name", WRITERS)
def test_cut_short_anywhere(name: str) -> None:
    """A call stays as far as it has come; before it is announced, its text is content."""
    form, calls = FORMS[name], [("get_weather", {"city": "Zürich", "days": [1, 2]})]
    output = WRITERS[name](calls)
    ((_, truth),) = written(calls)
    num_begun = 0
    for end in range(len(output)):
        text = output[:end]
        whole = parse([text], settings(form, calls))
        assert parse(list(text), settings(form, calls)) == whole
        if whole.calls:
            ((function, arguments),) = whole.calls
            assert function == "get_weather" and truth.startswith(arguments) and not whole.content
            num_begun += 1
        else:
            assert whole.content == text
    assert num_begun > 10


@pytest.mark.parametrize("name", WRITERS)
def test_what_only_begins_like_a_call_is_content(name: str) -> None:
    form, calls = FORMS[name], CALLS["simple"]
    output = WRITERS[name](calls)
    at = output.index("get_weather")
    for broken in (output[:at] + "\n\n\n" * 100 + "?", *(mark + " is a mark." for mark in form.opens)):
        found = every_split(broken, settings(form, calls)) if len(broken) < 200 else parse([broken], settings(form))
        assert (found.calls, found.content) == ([], broken)


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in BARE_KEYS])
def test_a_broken_call_is_taken_back(name: str) -> None:
    """Arguments that stop being JSON: the text is content, whatever has been told of the call."""
    form, calls = FORMS[name], [("f", {"a": "x", "b": 1})]
    output = WRITERS[name](calls).replace('"b": 1', '"b": wrong')
    found = every_split(output, settings(form, calls))
    assert found.calls == [] and found.content == output


@pytest.mark.parametrize("name", WRITERS)
def test_one_call_where_parallel_ones_are_off(name: str) -> None:
    calls = CALLS["three alike"]
    found = every_split(WRITERS[name](calls), settings(FORMS[name], calls, is_parallel=False))
    assert (found.calls, found.content) == (written(calls[:1]), "")


@pytest.mark.parametrize("name", [name for name in WRITERS if BY_FORM[name].frame[0]])
def test_a_frame_around_arguments_is_a_call(name: str) -> None:
    """What a grammar writes around a call's arguments."""
    form, calls = FORMS[name], CALLS["nested"]
    before, behind = form.frame
    output = before.replace("{name}", "f") + json.dumps(calls[0][1]) + behind
    found = every_split(output, settings(form, calls))
    assert (found.calls, found.content) == (written(calls), "")


def test_other_spellings() -> None:
    """What models of a format also write."""
    cases = {
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}'): [("f", {"a": 1})],
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\":1}"}</tool_call>'): [("f", {"a": 1})],
        ("hermes", '<tool_call>{"name": "f"}</tool_call>'): [("f", {})],
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>'): [("f", {})],
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\u00e9\\ud83c\\udf89"}}'): [
            ("f", {"a": "é🎉"})
        ],
        ("mistral", '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g{"b": 2}'): [("f", {"a": 1}), ("g", {"b": 2})],
        ("mistral", '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}'): [("f", {"a": 1})],
        ("llama3_json", '<|python_tag|>{"name": "f", "arguments": {"a": 1}}'): [("f", {"a": 1})],
        ("llama3_json", '{"type": "function", "name": "f", "parameters": {"a": 1}}'): [("f", {"a": 1})],
        ("granite", '<tool_call>[{"name": "f", "arguments": {}}]'): [("f", {})],
        ("granite", '[{"name": "f", "arguments": {}}]'): [("f", {})],
        ("minimax", '<tool_calls>\n{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}\n</tool_calls>'): [
            ("f", {}), ("g", {}),
        ],
        ("pythonic", "[f(a=(1, 2,), b={'x': None, 1: +2.5}, c=1_000, d='\\x41\\u00e9\\101', e=.5, f=1.)]"): [
            ("f", {"a": [1, 2], "b": {"x": None, "1": 2.5}, "c": 1000, "d": "AéA", "e": 0.5, "f": 1.0})
        ],
        ("qwen3_coder", "<function=f>\n<parameter=a>\nx\n</parameter>\n</function>"): [("f", {"a": "x"})],
        ("qwen3_coder", "<tool_call><function=f></function></tool_call>"): [("f", {})],
        ("glm45", "<tool_call>f</tool_call>"): [("f", {})],
        ("glm47", "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"): [("f", {"a": 1})],
        ("xlam", '```json\n[{"name": "f", "arguments": {}}]\n```'): [("f", {})],
    }  # fmt: skip
    for (name, output), calls in cases.items():
        found = every_split(output, settings(FORMS[name], [("f", {})]))
        assert [(call, json.loads(text)) for call, text in found.calls] == calls, output


def test_an_object_with_a_name_is_an_answer() -> None:
    """Only a tool may be called without arguments."""
    for name in ("llama3_json", "granite", "hermes"):
        form = FORMS[name]
        text = '{"name": "Bob", "age": 5}'
        text = f"[{text}]" if name == "granite" else text if form.is_first else f"<tool_call>{text}</tool_call>"
        assert every_split(text, settings(form, [("f", {})])) == Found(text)


def test_names_that_internlm_does_not_know_are_no_calls() -> None:
    output = WRITERS["internlm"]([("g", {"a": 1})])
    assert every_split(output, settings(FORMS["internlm"], [("f", {})])) == Found(output)


def test_values_take_the_type_of_the_schema() -> None:
    properties = {
        "text": {"type": "string"}, "count": {"type": "integer"}, "maybe": {"type": ["string", "null"]},
        "flag": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "kind": {"enum": ["a", "b"]},
        "deep": {"$ref": "#/$defs/deep"},
    }  # fmt: skip
    schema = {"properties": properties, "$defs": {"deep": {"type": "object"}}}
    given = {
        "text": ("12", "12"), "count": ("12", 12), "maybe": ("null", None), "flag": ("True", True), "kind": ("a", "a"),
        "deep": ('{"x": [1]}', {"x": [1]}), "unknown": ("[1]", [1]), "other": ("plain", "plain"),
        "odd": ("{1: 2}", "{1: 2}"), "call": ("__import__('os')", "__import__('os')"),
    }  # fmt: skip
    output = "<function=f>" + "".join(f"<parameter={k}>\n{text}\n</parameter>" for k, (text, _) in given.items())
    parsed = ParseSettings(tools={"f": schema}, choice="auto", format=FORMS["qwen3_coder"])
    ((_, arguments),) = every_split(output + "</function>", parsed).calls
    assert json.loads(arguments) == {name: value for name, (_, value) in given.items()}


def test_nothing_is_evaluated() -> None:
    values = ("a=__import__('os').system('id')", "a=1+1", "a=[x for x in y]", "*a", "1", "a=b", "a=f'{x}'", "a=1, a=2")
    for text in (*(f"[f({value})]" for value in values), "[f(a=lambda: 0)]", "[open('x')]", "[f(a=0123)]"):
        assert every_split(text, settings(FORMS["pythonic"])) == Found(text)
