"""The grammars of tool calls in the formats of models: what may follow the mark that begins a call.

Arguments of strict tools are held to their schema; those of others are any object, as their format writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from fuseline.api.errors import bad_request
from fuseline.api.parsers.formats import ToolFormat
from fuseline.api.parsers.gemma import Gemma
from fuseline.api.parsers.mistral import NAME, read_mistral
from fuseline.api.parsers.pythonic import Pythonic
from fuseline.api.parsers.shapes import Tagged
from fuseline.api.prompt.tagged_grammar import tagged_call
from fuseline.api.prompt.tools import ANY_OBJECT, Tool, arguments_schema
from fuseline.api.structured.ebnf import Rules, choice, literal, sequence
from fuseline.api.structured.notation import BLANK, JSON, PYTHON_CALL, Notation, marked
from fuseline.api.structured.schema import SchemaGrammar


def call_grammar(form: ToolFormat, tools: Sequence[Tool]) -> str:
    """Text of the grammar of what follows a mark of `form.opens`, or its bare begin. Raises ApiError 400 that names
    `tools`.
    """
    rules = Rules()
    for tool in tools:
        if not form.takes_name(tool.name):
            raise bad_request(f"tools: {tool.name!r} cannot be called in the format of this model", "tools")
    if isinstance(form.read, Tagged):
        return rules.text(choice(tagged_call(rules, form.read, tool) for tool in tools))
    if isinstance(form.read, Pythonic):
        return rules.text(_pythonic(rules, form, tools))
    if isinstance(form.read, Gemma):
        return rules.text(_gemma(rules, form, tools))
    return rules.text(_framed(rules, form, tools))


def arguments_expression(rules: Rules, tool: Tool, notation: Notation = JSON, is_held: bool = False) -> str:
    """A tool's arguments as an object, held to their schema if the tool is strict, or with `is_held`."""
    schema = arguments_schema(tool) if is_held or tool.is_strict else ANY_OBJECT
    return SchemaGrammar(schema, rules, "tools", notation=notation).arguments()


def _pythonic(rules: Rules, form: ToolFormat, tools: Sequence[Tool]) -> str:
    """Calls with keyword arguments: in a list, or one a line."""
    call = _either(rules, tools, PYTHON_CALL)
    if form.read.is_list:
        calls = sequence('"["', BLANK, call, f'({BLANK} "," {BLANK} {call})*', BLANK, '"]"')
    else:
        calls = sequence(call, rf'({BLANK} "\n" {BLANK} {call})*')
    end = sequence(BLANK, choice(map(literal, form.ends))) if form.ends else ""
    return sequence(BLANK, calls, f"({end})?" if end and form.bare else end)


def _gemma(rules: Rules, form: ToolFormat, tools: Sequence[Tool]) -> str:
    call = _either(rules, tools, marked(form.read.quote))
    return sequence(BLANK, literal("call:"), call, BLANK, choice(map(literal, form.ends)))


def _either(rules: Rules, tools: Sequence[Tool], notation: Notation) -> str:
    """A tool's name and its arguments."""
    calls = (sequence(literal(tool.name), arguments_expression(rules, tool, notation)) for tool in tools)
    return rules.add(choice(calls), "call")


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
    plain = [tool for tool in tools if NAME.fullmatch(tool.name)]
    newer = [sequence(literal(tool.name), '"[ARGS]"?', arguments_expression(rules, tool)) for tool in plain]
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
