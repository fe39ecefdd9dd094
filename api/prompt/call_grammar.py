"""The grammars of tool calls in the formats of models: what may follow the mark that begins a call.

Arguments of strict tools are held to their schema; those of others are any object, as their format writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fuseline.api.errors import bad_request
from fuseline.api.parsers.formats import ToolFormat
from fuseline.api.parsers.mistral import read_mistral
from fuseline.api.parsers.shapes import Tagged
from fuseline.api.parsers.values import types_of
from fuseline.api.prompt.tools import ANY_OBJECT, Tool, arguments_schema
from fuseline.api.structured.ebnf import (
    EVERY_CHAR,
    Rules,
    char_set,
    choice,
    complement,
    intersection,
    literal,
    of_chars,
    repeat,
    sequence,
)
from fuseline.api.structured.formats import FORMATS
from fuseline.api.structured.keywords import ANNOTATIONS
from fuseline.api.structured.regex import RegexGrammar
from fuseline.api.structured.schema import SchemaGrammar

BLANK = r"[ \n]{0,3}"
"""Between the parts of a call."""
PLAIN_STRING = ANNOTATIONS | set("type enum const pattern format minLength maxLength".split())


def call_grammar(form: ToolFormat, tools: Sequence[Tool]) -> str | None:
    """Text of the grammar of what follows a mark of `form.opens`, or its bare begin; None for formats whose arguments
    no grammar is made for. Raises ApiError 400 that names `tools`.
    """
    rules = Rules()
    if isinstance(form.read, Tagged):
        calls = [_tagged(rules, form.read, tool) for tool in tools]
        return rules.text(choice(calls))
    if not form.frame[0]:
        return None
    return rules.text(_framed(rules, form, tools))


def arguments_expression(rules: Rules, tool: Tool) -> str:
    """JSON of a tool's arguments."""
    schema = arguments_schema(tool) if tool.is_strict else ANY_OBJECT
    return SchemaGrammar(schema, rules, "tools").expression()


def _framed(rules: Rules, form: ToolFormat, tools: Sequence[Tool]) -> str:
    """JSON arguments within the format's frame: one call, or a list of them."""
    before, behind = form.frame
    mark = next((mark for mark in form.opens if mark in before), "")
    head = before.partition(mark)[2] if mark else before
    is_list = head.strip().startswith("[")
    tail, _, rest = behind.partition("]") if is_list else (behind, "", "")
    end = next((end for end in form.ends if end in behind), "")
    tail = (tail.partition(end)[0] if end and end in tail else tail).strip()
    behind_arguments = sequence(BLANK, literal(tail)) if tail else ""
    call = rules.add(choice(
        sequence(_head(head.lstrip().removeprefix("["), tool), arguments_expression(rules, tool), behind_arguments)
        for tool in tools
    ), "call")  # fmt: skip
    close = sequence(BLANK, literal(end)) if end else ""
    if is_list:
        found = sequence(BLANK, '"["', BLANK, call, f'({BLANK} "," {BLANK} {call})*', BLANK, '"]"', close)
    elif form.bare:
        found = sequence(BLANK, call, f'(";" {BLANK} {call})*', close)
    else:
        found = sequence(BLANK, call, close)
    if form.read is not read_mistral:
        return found
    newer = [sequence(literal(tool.name), '"[ARGS]"?', arguments_expression(rules, tool)) for tool in tools]
    return choice([found, *newer])


def _head(text: str, tool: Tool) -> str:
    """The text in front of the arguments; a number in it counts the calls."""
    before, _, behind = text.partition("{name}")
    name = json.dumps(tool.name)[1:-1] if before.endswith('"') else tool.name
    return sequence(_text(before), literal(name), _text(behind))


def _text(text: str) -> str:
    """Text of a frame: any blanks where it ends with one, and any number where it has 0."""
    parts = [part for part in re.split(r"( $|0)", text) if part]
    return sequence(*(BLANK if part == " " else "[0-9]{1,3}" if part == "0" else literal(part) for part in parts))


def _tagged(rules: Rules, shape: Tagged, tool: Tool) -> str:
    """A name, then arguments between tags."""
    name_end = choice([literal(end) for end in shape.name_ends if end not in (shape.key_opens, shape.closes)])
    head = sequence(literal(tool.name), f"({name_end})?" if shape.key_opens in shape.name_ends else name_end)
    if not tool.is_strict:
        return sequence(head, rules.add(text_until(rules, shape.closes), "free"))
    schema = arguments_schema(tool)
    properties, required = schema.get("properties", {}), schema.get("required", ())
    if any(name not in properties for name in required) or "$ref" in schema:
        raise _refuse(tool, "the format of this model needs the properties of the arguments")
    parts = []
    for name in properties:
        part = sequence(BLANK, literal(f"{shape.key_opens}{name}{shape.key_ends}"), _value(rules, shape, tool, name))
        parts.append(part if name in required else repeat(part, 0, 1))
    return sequence(head, *parts, BLANK, literal(shape.closes))


def _value(rules: Rules, shape: Tagged, tool: Tool, name: str) -> str:
    opens = sequence(BLANK, literal(shape.value_opens)) if shape.value_opens else ""
    schema = arguments_schema(tool)
    value = schema["properties"][name]
    if "string" not in types_of(schema, name):
        made = SchemaGrammar({**_definitions(schema), **value} if isinstance(value, dict) else value, rules, "tools")
        return sequence(opens, BLANK, made.expression(), BLANK, literal(shape.value_ends))
    if not isinstance(value, dict) or not PLAIN_STRING >= set(value) or value.get("type", "string") != "string":
        raise _refuse(tool, f"{name}: the format of this model takes a string of one plain schema there")
    line = r'"\n"?'
    text = _string(rules, value)
    if text is None:
        return sequence(opens, rules.add(text_until(rules, shape.value_ends), "text"))
    return sequence(opens, line, text, line, literal(shape.value_ends))


def _definitions(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def _string(rules: Rules, value: dict[str, Any]) -> str | None:
    """A string without quotes; None for one of any text."""
    values = [value["const"]] if "const" in value else value.get("enum")
    if values is not None:
        return choice(literal(str(text)) for text in values)
    pattern = value.get("pattern") or FORMATS.get(value.get("format", ""))
    if pattern is not None:
        return RegexGrammar(rules, "tools").expression(pattern)
    if "minLength" in value or "maxLength" in value:
        letter = char_set(intersection(EVERY_CHAR, complement(of_chars("<\n"))))
        return rules.repeat(letter, value.get("minLength", 0), value.get("maxLength"))
    return None


def text_until(rules: Rules, end: str) -> str:
    """Any text up to the first `end`, and `end`. The first character of `end` comes in it once."""
    first, others = end[0], char_set(complement(of_chars(end[0])))
    states = [rules.reserve("until") for _ in end]
    rules.define(states[0], f"{others} {states[0]} | {literal(first)} {states[1]}")
    for index in range(1, len(end)):
        rest = char_set(complement(of_chars({first, end[index]})))
        after = f" {states[index + 1]}" if index + 1 < len(end) else ""
        rules.define(
            states[index],
            f"{literal(end[index])}{after} | {literal(first)} {states[1]} | {rest} {states[0]}",
        )
    return states[0]


def _refuse(tool: Tool, reason: str) -> Exception:
    return bad_request(f"tools: {tool.name}: strict is not possible: {reason}", "tools", "unsupported_value")
