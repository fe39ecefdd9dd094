"""Grammars of harmony, the format of gpt-oss: what an answer is held to stands in a channel of its own.

The prompt ends within a header (<|start|>assistant), and reasoning may come first.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from fuseline.api.errors import bad_request
from fuseline.api.prompt.auto_grammar import Format, can_be_part, format_of, tag_spec
from fuseline.api.prompt.call_grammar import arguments_expression
from fuseline.api.prompt.tools import Tool, ToolUse
from fuseline.api.structured.ebnf import Rules, choice, literal, sequence, text_until
from fuseline.engine.params import GrammarSpec

ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
END, NEXT = "<|end|>", "<|start|>assistant"
RECIPIENT = "to=functions."
Marks = Sequence[tuple[int, str]]


def channel_spec(use: ToolUse, asked: GrammarSpec | None, has_format: bool, marks: Marks) -> GrammarSpec | None:
    """The grammar of an answer in channels; None where nothing is held. `asked`: the request's own, by its
    response_format if `has_format`. Raises ApiError 400 that names `tools`.
    """
    if use.choice in ("named", "required"):
        return tag_spec(_behind_analysis([_calls(use.tools)]), marks, is_free=False)
    if asked is not None:
        if not can_be_part(asked):
            return asked
        final: list[Format] = [{"type": "sequence", "elements": [_text(FINAL), format_of(asked)]}]
        calls = [_calls(use.tools, is_held=False)] if use.choice == "auto" and has_format else []
        return structs.replace(tag_spec(_behind_analysis(final + calls), marks, is_free=False), is_slow=asked.is_slow)
    if use.choice == "auto" and (use.is_limited or any(tool.is_strict for tool in use.tools)):
        dispatch = {"type": "dispatch", "rules": [[RECIPIENT, _grammar(_call(Rules(), use.tools))]]}
        return tag_spec(dispatch, marks, is_free=True)
    return None


def _behind_analysis(answers: list[Format]) -> Format:
    rules = Rules()
    begin = sequence(literal(ANALYSIS), text_until(rules, END), literal(NEXT))
    analysis = {"type": "optional", "content": {"type": "grammar", "grammar": rules.text(begin)}}
    answer = answers[0] if len(answers) == 1 else {"type": "or", "elements": answers}
    return {"type": "sequence", "elements": [analysis, answer]}


def _calls(tools: Sequence[Tool], is_held: bool = True) -> Format:
    """A call in its channel. With `is_held` the arguments of all tools are held to their schemas, not of strict ones
    alone."""
    rules = Rules()
    header = choice([literal("<|channel|>commentary " + RECIPIENT), literal(f" {RECIPIENT}")])
    return {"type": "grammar", "grammar": rules.text(sequence(header, _after_recipient(rules, tools, is_held)))}


def _call(rules: Rules, tools: Sequence[Tool]) -> str:
    return rules.text(_after_recipient(rules, tools))


def _after_recipient(rules: Rules, tools: Sequence[Tool], is_held: bool = False) -> str:
    """The rest of a header, whose parts models write in two orders, and the arguments."""
    for tool in tools:
        if set(tool.name) & set("< \t\r\n"):
            raise bad_request(f"tools: {tool.name!r} cannot be called in the format of this model", "tools")
    kind = '" "? ("<|channel|>commentary" " "?)? ("<|constrain|>"? "json")? "<|message|>"'
    made = [(literal(tool.name), arguments_expression(rules, tool, is_held=is_held)) for tool in tools]
    return choice(sequence(name, kind, arguments) for name, arguments in made)


def _text(text: str) -> Format:
    return {"type": "const_string", "value": text}


def _grammar(text: str) -> Format:
    return {"type": "grammar", "grammar": text}
