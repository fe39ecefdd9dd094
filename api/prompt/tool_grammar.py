"""The grammar that a request's tools make of its answer (SPEC 9.1)."""

from __future__ import annotations

import json
from dataclasses import dataclass

from msgspec.structs import replace

from fuseline.api.config import ServerConfig
from fuseline.api.parsers.choice import HARMONY
from fuseline.api.parsers.formats import ToolFormat
from fuseline.api.parsers.harmony import MARKS
from fuseline.api.parsers.reasoning import ReasoningFormat, Start
from fuseline.api.parsers.registry import Formats, find_reasoning
from fuseline.api.prompt.auto_grammar import (
    behind_reasoning,
    call_or_answer,
    can_be_part,
    spelled_marks,
    strict_format,
    tag_spec,
)
from fuseline.api.prompt.call_grammar import arguments_expression
from fuseline.api.prompt.channels import ANALYSIS, END, FINAL, NEXT, channel_spec
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.grammar import TaggedSchema, structured_spec
from fuseline.api.prompt.tools import ToolUse, arguments_schema
from fuseline.api.protocol.chat import ChatRequest
from fuseline.api.structured.ebnf import Rules
from fuseline.engine.params import GrammarSpec, SamplingParams, ThinkingBudget

ASKED = ("enable_thinking", "thinking")
"""Variables with which templates ask for reasoning."""


@dataclass(frozen=True)
class Thinking:
    """Reasoning as the prompt leaves it."""

    form: ReasoningFormat | None = None
    start: Start = ""
    is_asked: bool = False
    """The request has asked the template for it."""

    @property
    def has_begun(self) -> bool:
        form = self.form
        return form is not None and (self.start == "open" or (form.is_assumed and self.start == ""))

    @property
    def may_begin(self) -> bool:
        """A model that is not asked is not given the choice: with all else forbidden it would take it."""
        return self.form is not None and self.start == "" and self.is_asked


def thinking_of(body: ChatRequest, start: Start, config: ServerConfig) -> Thinking:
    variables = {**dict(config.default_chat_template_kwargs), **(body.chat_template_kwargs or {})}
    is_asked = any(variables.get(name) is True for name in ASKED)
    return Thinking(find_reasoning(config.reasoning_parser), start, is_asked)


@dataclass(frozen=True)
class Answers:
    """How this server's model writes the answer to a prompt."""

    thinking: Thinking
    formats: Formats
    tokenizer: TextTokenizer

    @property
    def is_harmony(self) -> bool:
        return HARMONY in (self.formats.tools, self.formats.reasoning)


def thinking_budget(num_tokens: int, answers: Answers, has_calls: bool) -> ThinkingBudget | None:
    """None where the answer has no reasoning. `has_calls`: harmony's reasoning may be followed by a call."""
    form, start = answers.thinking.form, answers.thinking.start
    if answers.is_harmony:
        end = END if has_calls else f"{END}{NEXT}{FINAL}"
        begins, ends, is_open = (ANALYSIS,), (END,), False
    elif form is None or start == "closed":
        return None
    else:
        begins, ends, end = form.begins, (*form.ends, *form.stops), form.ends[0]
        is_open = answers.thinking.has_begun
    tokenizer = answers.tokenizer
    token = tokenizer.token_id(end)
    return ThinkingBudget(
        num_tokens=num_tokens, begins=begins, ends=ends, is_open=is_open, may_resume=answers.is_harmony,
        end_token_ids=tuple(tokenizer.encode_behind(end)) if token is None else (token,),
        spelled=tuple(spelled_marks((*begins, *ends), tokenizer)),
    )  # fmt: skip


def with_grammar(params: SamplingParams, use: ToolUse, answers: Answers, has_format: bool) -> SamplingParams:
    """The parameters with the grammar of the request's tools, or with its own, behind the reasoning.

    `has_format`: the request's grammar is that of its response_format. Raises ApiError 400 that names `tools`.
    """
    asked = params.grammar
    if answers.is_harmony:
        grammar = channel_spec(use, asked, has_format, spelled_marks(MARKS, answers.tokenizer))
        return replace(params, grammar=grammar)
    grammar = tool_spec(use) or _auto_spec(use, asked, has_format, answers) or asked
    return replace(params, grammar=grammar and _behind_reasoning(grammar, answers))


def _auto_spec(use: ToolUse, asked: GrammarSpec | None, has_format: bool, answers: Answers) -> GrammarSpec | None:
    """The grammar of calls by the model's own choice, and of the answer in their stead; None where nothing is held."""
    form, is_strict = answers.formats.tools, use.is_limited or any(tool.is_strict for tool in use.tools)
    if use.choice != "auto" or not isinstance(form, ToolFormat):
        return None
    if not (is_strict if asked is None else has_format and can_be_part(asked)):
        return None
    made = strict_format(form, use.tools) if asked is None else call_or_answer(form, use.tools, asked)
    spec = tag_spec(made, spelled_marks(form.marks, answers.tokenizer), is_free=asked is None)
    return replace(spec, is_slow=asked is not None and asked.is_slow)


def _behind_reasoning(grammar: GrammarSpec, answers: Answers) -> GrammarSpec:
    """The same grammar once the reasoning in front of it, if there is any, has ended."""
    thinking = answers.thinking
    if starts_after := reasoning_end(thinking, answers.tokenizer):
        return replace(grammar, starts_after=starts_after)
    if thinking.has_begun:
        return behind_reasoning(grammar, thinking.form, answers.tokenizer, is_open=True)
    if thinking.may_begin or (grammar.is_free and thinking.form is not None and thinking.start == ""):
        return behind_reasoning(grammar, thinking.form, answers.tokenizer)
    return grammar


def tool_spec(use: ToolUse) -> GrammarSpec | None:
    """The grammar of the whole answer: the arguments of the named function, or a list of calls; None asks for none.

    Raises ApiError 400 that names `tools`.
    """
    if use.choice == "named":
        rules = Rules()
        return GrammarSpec(kind="ebnf", text=rules.text(arguments_expression(rules, use.tools[0], is_held=True)))
    if use.choice != "required":
        return None
    tags = [
        TaggedSchema(f'{{"name": {json.dumps(tool.name)}, "parameters": ', arguments_schema(tool), "}")
        for tool in use.tools
    ]
    most = None if use.is_parallel else 1
    return structured_spec(tags, prefix="[", separator=", ", suffix="]", most=most)


def reasoning_end(thinking: Thinking, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Tokens behind which a grammar begins; none where no reasoning has begun, or its end is no token."""
    if not thinking.has_begun:
        return ()
    end = tokenizer.token_id(thinking.form.ends[0])
    return () if end is None else (end,)
