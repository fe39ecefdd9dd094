"""Outputs of models with tool calls: for each format its own writer, and the truth of what it has written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fuseline.api.output.events import CallRevoked, Part, ReasoningDelta, TextDelta, ToolCallDelta
from fuseline.api.parsers.choice import ParseSettings, TextParser

Call = tuple[str, dict[str, Any]]


@dataclass
class Found:
    """What a parser made of a text."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """(name, arguments as text)."""


def parse(pieces: list[str], settings: ParseSettings) -> Found:
    """Fold of the events that the pieces make. A call's id and name come once, with its first event."""
    parser = TextParser(0, settings)
    events: list[Part] = []
    for piece in pieces:
        events += parser.feed(piece)
    events += parser.finish()
    return fold(events)


def fold(events: list[Part]) -> Found:
    found, calls = Found(), {}
    for event in events:
        if isinstance(event, TextDelta):
            found.content += event.text
        elif isinstance(event, ReasoningDelta):
            found.reasoning += event.text
        elif isinstance(event, CallRevoked):
            del calls[event.call]
        else:
            assert isinstance(event, ToolCallDelta) and (event.name is not None) == (event.call not in calls)
            assert (event.id is None) == (event.name is None) and event.arguments
            name, arguments = calls.get(event.call, (event.name, ""))
            calls[event.call] = (name, arguments + event.arguments)
    found.calls = list(calls.values())
    return found


def every_split(text: str, settings: ParseSettings) -> Found:
    """What the whole text gives, which must be what it gives in letters and in any two pieces."""
    whole = parse([text], settings)
    assert parse(list(text), settings) == whole, "letter by letter"
    for at in range(1, len(text)):
        assert parse([text[:at], text[at:]], settings) == whole, (text[:at], text[at:])
    return whole


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def as_object(call: Call, key: str = "arguments") -> str:
    return f'{{"name": {dumps(call[0])}, "{key}": {dumps(call[1])}}}'


def as_list(calls: list[Call], key: str = "arguments") -> str:
    return f"[{', '.join(as_object(call, key) for call in calls)}]"


def each(before: str, behind: str, write: Callable[[Call], str] = as_object, between: str = "") -> Callable:
    return lambda calls: between.join(before + write(call) + behind for call in calls)


def around(before: str, behind: str, write: Callable[[list[Call]], str] = as_list) -> Callable:
    return lambda calls: before + write(calls) + behind


def python_call(call: Call) -> str:
    return f"{call[0]}({', '.join(f'{key}={value!r}' for key, value in call[1].items())})"


def python_list(calls: list[Call]) -> str:
    return f"[{', '.join(map(python_call, calls))}]"


def tagged(head: str, key: str, value: str, end: str) -> Callable[[Call], str]:
    """Arguments one by one: strings as they are, the rest as JSON."""

    def write(call: Call) -> str:
        texts = {name: given if isinstance(given, str) else dumps(given) for name, given in call[1].items()}
        return head % call[0] + "".join(key % name + text + value for name, text in texts.items()) + end

    return write


def gemma(quote: str) -> Callable[[Call], str]:
    def value(given: Any) -> str:
        if isinstance(given, str):
            return quote + given + quote
        if isinstance(given, dict):
            return "{" + ",".join(f"{key}:{value(inner)}" for key, inner in given.items()) + "}"
        return "[" + ",".join(map(value, given)) + "]" if isinstance(given, list) else dumps(given)

    return lambda call: f"call:{call[0]}{value(call[1])}"


def kimi(calls: list[Call]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{k}<|tool_call_argument_begin|>{dumps(arguments)}<|tool_call_end|>"
        for k, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


XML = tagged("<function=%s>\n", "<parameter=%s>\n", "\n</parameter>\n", "</function>")
INVOKE = tagged('<invoke name="%s">\n', '<parameter name="%s">', "</parameter>\n", "</invoke>\n")
STEP = tagged(
    '<steptml:invoke name="%s">', '<steptml:parameter name="%s">', "</steptml:parameter>", "</steptml:invoke>"
)
GLM = tagged("<tool_call>%s\n", "<arg_key>%s</arg_key>\n<arg_value>", "</arg_value>\n", "</tool_call>")
DEEPSEEK = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"

WRITERS: dict[str, Callable[[list[Call]], str]] = {
    "hermes": each("<tool_call>\n", "\n</tool_call>", between="\n"),
    "mistral": around("[TOOL_CALLS]", ""),
    "llama3_json": lambda calls: "; ".join(as_object(call, "parameters") for call in calls),
    "pythonic": python_list,
    "granite": around("<|tool_call|>", ""),
    "granite-20b-fc": each("<function_call> ", "", between=" "),
    "internlm": each("<|action_start|><|plugin|>", "<|action_end|>", lambda call: as_object(call, "parameters")),
    "jamba": around("<tool_calls>", "</tool_calls>"),
    "llama4_pythonic": around("<|python_start|>", "<|python_end|>", python_list),
    "olmo3": around("<function_calls>", "</function_calls>", lambda calls: "\n".join(map(python_call, calls))),
    "lfm2": around("<|tool_call_start|>", "<|tool_call_end|>", python_list),
    "qwen3_coder": each("<tool_call>\n", "\n</tool_call>", XML, "\n"),
    "seed_oss": each("<seed:tool_call>\n", "\n</seed:tool_call>", XML, "\n"),
    "glm45": each("", "", GLM, "\n"),
    "minimax_m2": around("<minimax:tool_call>\n", "</minimax:tool_call>", each("", "", INVOKE)),
    "step3": around(
        "<｜tool_calls_begin｜>", "<｜tool_calls_end｜>",
        each("<｜tool_call_begin｜>function<｜tool_sep｜>", "<｜tool_call_end｜>", STEP),
    ),
    "deepseek_v3": around(*DEEPSEEK, each(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```<｜tool▁call▁end｜>",
        lambda call: f"{call[0]}\n```json\n{dumps(call[1])}", "\n",
    )),
    "deepseek_v31": around(*DEEPSEEK, each(
        "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", lambda call: f"{call[0]}<｜tool▁sep｜>{dumps(call[1])}",
    )),
    "kimi_k2": kimi,
    "xlam": as_list,
    "phi4_mini_json": around("functools", ""),
    "longcat": each("<longcat_tool_call>", "</longcat_tool_call>"),
    "nemotron": around("<TOOLCALL>", "</TOOLCALL>"),
    "cohere": around("<|START_ACTION|>", "<|END_ACTION|>", lambda calls: dumps([
        {"tool_call_id": str(k), "tool_name": name, "parameters": arguments}
        for k, (name, arguments) in enumerate(calls)
    ])),
    "gemma4": each("<|tool_call>", "<tool_call|>", gemma('<|"|>')),
    "functiongemma": each("<start_function_call>", "<end_function_call>", gemma("<escape>")),
}  # fmt: skip
"""Format -> what a model writes for calls, as its template shows it."""

TAGGED = ("qwen3_coder", "seed_oss", "glm45", "minimax_m2", "step3")
"""Formats in which a string stands as it is, without escapes."""
BARE_KEYS = ("pythonic", "llama4_pythonic", "olmo3", "lfm2", "gemma4", "functiongemma", *TAGGED)
"""Formats whose keys are no strings in quotes."""

CALLS: dict[str, list[Call]] = {
    "simple": [("get_weather", {"city": "Paris"})],
    "empty arguments": [("now", {})],
    "numbers": [("f", {"a": 1, "b": -2.5, "c": 1e-05, "d": 0, "e": 12345678901234567890})],
    "words": [("f", {"a": True, "b": False, "c": None})],
    "words as text": [("f", {"a": "true", "b": "null", "c": "12"})],
    "nested": [("f", {"a": {"b": [1, {"c": [[], {}]}], "d": "x"}, "e": [[1, 2], [3]]})],
    "unicode": [("f", {"city": "Zürich", "note": "日本語 🎉 é"})],
    "quotes": [("f", {"a": 'say "hi"', "b": "it's", "c": "back\\slash"})],
    "lines": [("f", {"a": "one\ntwo\n\nthree", "b": "\ttab"})],
    "brackets": [("f", {"a": "}]{[,:", "b": "f(x=1), g()", "c": "<b>bold</b>"})],
    "text like JSON": [("f", {"a": '{"name": "g", "arguments": {}}', "b": "[1]"})],
    "empty text": [("f", {"a": "", "b": [], "c": {}})],
    "two": [("f", {"a": 1}), ("g", {"b": "x"})],
    "three alike": [("f", {"a": 1}), ("f", {"a": 1}), ("f", {"a": 1})],
    "empty and not": [("f", {}), ("g", {"a": [1]}), ("h", {})],
    "dotted name": [("files.read-all_2", {"path": "/tmp/a b.txt"})],
    "code": [("run", {"code": "if a < b and c > d:\n    print('x')"})],
    "many": [("f", {f"k{k}": k for k in range(12)})],
}

TEXTS = (
    "", "Hello.", " \n", "Two < three, [brackets] {braces} and ünïcode 🎉.", "[1] is a footnote; f(x) a function.",
    "{not json", '{"city": "Paris"}', "[link](http://x)", "<tool", "functoo", "[TOOL_", "<|", "a <tool_cal b", "<<<",
)  # fmt: skip
"""Outputs without calls: all of them is content, in every format."""


def schemas(calls: list[Call]) -> dict[str, Any]:
    """Tools that take these calls."""
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return {
        name: {"type": "object", "properties": {k: {"type": kinds.get(type(v), "null")} for k, v in arguments.items()}}
        for name, arguments in calls
    }
