"""Grammars of answers in which a model may call tools by its own choice: free text, and calls from their marks on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec.structs import replace

from fuseline.api.parsers.formats import ToolFormat
from fuseline.api.parsers.reasoning import ReasoningFormat
from fuseline.api.prompt.call_grammar import call_grammar
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.tools import Tool
from fuseline.api.structured.ebnf import Rules, char_set, choice, complement, literal, of_chars, sequence, text_until
from fuseline.api.structured.notation import BLANK
from fuseline.engine.params import GrammarSpec

Format = dict[str, Any]
"""A format of xgrammar's structural tags."""
ANY_TEXT: Format = {"type": "any_text"}


def strict_format(form: ToolFormat, tools: Sequence[Tool]) -> Format:
    """Free text with calls in it. Raises ApiError 400."""
    calls = call_grammar(form, tools)
    dispatch = _dispatch(form, calls)
    if not form.bare:
        return dispatch
    begins = [_sequence(_grammar(BLANK), _call(calls))]
    begins += [_sequence(_grammar(sequence(BLANK, literal(mark))), _call(calls)) for mark in form.opens]
    rest = [] if form.is_first else [dispatch]
    free = _sequence(_grammar(_no_begin(form)), dispatch)
    short = _grammar(sequence(BLANK, choice(literal(prefix) for prefix in _prefixes(form))))
    return _either([*(_sequence(begin, *rest) for begin in begins), free, short])


def call_or_answer(form: ToolFormat, tools: Sequence[Tool], answer: GrammarSpec) -> Format:
    """Calls and nothing in front of them, or an answer by a grammar. Raises ApiError 400."""
    calls = call_grammar(form, tools)
    groups = f"({choice(map(literal, form.groups))} {BLANK})*" if form.groups else ""
    found = [format_of(answer)]
    behind = [] if form.is_first else [_dispatch(form, calls)]
    for mark in form.opens:
        found.append(_sequence(_grammar(sequence(BLANK, groups, literal(mark))), _call(calls), *behind))
    if form.bare:
        found.append(_sequence(_call(calls), *behind))
    return _either(found)


def can_be_part(grammar: GrammarSpec) -> bool:
    """Whether a grammar can be part of a structural tag."""
    return grammar.backend == "xgrammar" and grammar.kind in ("ebnf", "structural_tag")


def format_of(grammar: GrammarSpec) -> Format:
    if grammar.kind == "ebnf":
        return {"type": "grammar", "grammar": grammar.text}
    return json.loads(grammar.text)["format"]


def behind_reasoning(
    grammar: GrammarSpec, form: ReasoningFormat, tokenizer: TextTokenizer, is_open: bool = False
) -> GrammarSpec:
    """The same language, and before it reasoning, if the model begins with the first mark of it, or has begun it."""
    if not can_be_part(grammar):
        return grammar
    rest, rules = format_of(grammar), Rules()
    end = {"type": "grammar", "grammar": rules.text(text_until(rules, form.ends[0]))}
    marks = dict(grammar.spelled) | dict(spelled_marks((form.begins[0], form.ends[0]), tokenizer))
    if is_open:
        made = _sequence(end, rest)
    else:
        made = _either([_sequence(_grammar(sequence(BLANK, literal(form.begins[0]))), end, rest), rest])
    return replace(tag_spec(made, sorted(marks.items()), grammar.is_free), is_slow=grammar.is_slow)


def tag_spec(form: Format, spelled: Iterable[tuple[int, str]], is_free: bool) -> GrammarSpec:
    text = json.dumps({"type": "structural_tag", "format": form})
    return GrammarSpec(kind="structural_tag", text=text, spelled=tuple(spelled), is_free=is_free)


def spelled_marks(marks: Iterable[str], tokenizer: TextTokenizer) -> list[tuple[int, str]]:
    """Special tokens that are part of marks: grammars read them as text."""
    texts = list(marks)
    special = [text for text, is_special in tokenizer.added_tokens.items() if is_special]
    return sorted((tokenizer.token_id(text), text) for text in special if any(text in mark for mark in texts))


def _dispatch(form: ToolFormat, calls: str) -> Format:
    """Text in which a mark begins a call."""
    return {"type": "dispatch", "rules": [[mark, _call(calls)] for mark in form.opens]} if form.opens else ANY_TEXT


def _call(calls: str) -> Format:
    return {"type": "grammar", "grammar": calls}


def _grammar(expression: str) -> Format:
    return {"type": "grammar", "grammar": f"root ::= {expression}"}


def _sequence(*parts: Format) -> Format:
    return {"type": "sequence", "elements": list(parts)} if len(parts) > 1 else parts[0]


def _either(parts: list[Format]) -> Format:
    return {"type": "or", "elements": parts}


def _prefixes(form: ToolFormat) -> list[str]:
    """Texts that may become a mark, but for those that are taken for calls already: the empty one first."""
    marks = [mark for mark in form.opens if mark[0] not in form.bare]
    return list(dict.fromkeys(["", *(mark[:size] for mark in marks for size in range(len(mark)))]))


def _no_begin(form: ToolFormat) -> str:
    """The begin of a text that begins neither with a mark nor with a character that stands for one."""
    parts = []
    for prefix in _prefixes(form):
        nexts = {mark[len(prefix)] for mark in form.opens if mark.startswith(prefix) and len(mark) > len(prefix)}
        shut = nexts if prefix else nexts | set(form.bare) | set(" \n")
        parts.append(sequence(literal(prefix) if prefix else "", char_set(complement(of_chars(sorted(shut))))))
    return sequence(BLANK, choice(parts))
