"""The work of parsers for a character is bounded, whatever a model writes; steps are counted, not seconds."""

from __future__ import annotations

import pytest
from tool_outputs import WRITERS

from fuseline.api.parsers.choice import HARMONY, ParseSettings, TextParser
from fuseline.api.parsers.formats import tool_formats
from fuseline.api.parsers.reasoning import reasoning_formats

MAX_STEPS = 150
"""Characters looked at or copied for each character of an output: a few marks' length."""


def hostile(marks: tuple[str, ...]) -> list[str]:
    """Outputs of about 600 characters that begin things without end."""
    first = marks[0] if marks else "[f("
    call = first + '{"name": "f", "arguments": '
    units = (
        "a",
        " ",
        "<",
        "[",
        "{",
        '"',
        "\\",
        "\n",
        "f(",
        "[[",
        '{"a":',
        "\ud7ff",
        "0",
        first,
        first[:-1],
        first + "{",
        call,
    )
    opened = (call + '{"a": "' + "x\\" * 300, call + "{" + '"a": 1, ' * 75, call + "[" * 600, call + '{"a":' * 120,
              first + '[{"name": "' + "y" * 600, "[f(a='" + "x" * 600, "[f(a=" + "[" * 600, first + " " * 600,
              call + '{"a": ' + "1" * 600, call + '{"a"' + " " * 600)  # fmt: skip
    return [unit * (600 // len(unit)) for unit in units] + list(opened)


def num_steps(text: str, settings: ParseSettings) -> int:
    parser = TextParser(0, settings)
    for letter in text:
        parser.feed(letter)
    parser.finish()
    return parser.num_steps


@pytest.mark.parametrize("name", WRITERS)
def test_the_work_of_tool_formats_is_linear(name: str) -> None:
    form = tool_formats()[name]
    settings = ParseSettings(tools={"f": {}}, choice="auto", format=form)
    for text in hostile(form.marks):
        assert num_steps(text, settings) <= MAX_STEPS * len(text), text[:60]


def test_the_work_of_reasoning_is_linear() -> None:
    for form in (*{id(form): form for form in reasoning_formats().values()}.values(), HARMONY):
        marks = ("<|channel|>", "<|start|>") if form == HARMONY else form.marks
        settings = ParseSettings(choice="none" if form != HARMONY else "auto", format=HARMONY, reasoning=form)
        for text in hostile(marks):
            assert num_steps(text, settings) <= MAX_STEPS * len(text), text[:60]


def test_bounds_of_what_a_call_may_be() -> None:
    """Depth, names and numbers have an end; what is beyond is content."""
    hermes = tool_formats()["hermes"]
    for arguments in ('{"a": ' + "[" * 1000, '{"a": ' + "1" * 10000 + "}}", '{"' + "k" * 10**6 + '": 1}'):
        text = '<tool_call>{"name": "f", "arguments": ' + arguments
        parser = TextParser(0, ParseSettings(choice="auto", format=hermes))
        parser.feed(text)
        parser.finish()
        assert parser.num_calls == (1 if "k" in arguments else 0)
    parser = TextParser(0, ParseSettings(choice="auto", format=hermes))
    (event,) = parser.feed('<tool_call>{"name": "' + "f" * 1000 + '"') + parser.finish()
    assert len(event.text) > 1000 and not parser.num_calls
