"""The grammar that a request's tools make of its answer (SPEC 9.1)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from fuseline.api.config import ServerConfig
from fuseline.api.parsers.reasoning import ReasoningFormat, Start
from fuseline.api.parsers.registry import find_reasoning
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.grammar import TaggedSchema, json_spec, structured_spec
from fuseline.api.prompt.tools import Tool, ToolUse
from fuseline.api.protocol.chat import ChatRequest
from fuseline.engine.messages import GrammarSpec, SamplingParams

ANY_OBJECT: dict[str, Any] = {"type": "object"}
ASKED = ("enable_thinking", "thinking")
"""Variables with which templates ask for reasoning."""
DESCRIBES_VALUES = ("type", "$ref", "anyOf", "oneOf", "allOf")


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


def with_grammar(params: SamplingParams, use: ToolUse, thinking: Thinking, tokenizer: TextTokenizer) -> SamplingParams:
    """The parameters with the grammar of the request's tools, or with its own, behind the reasoning.

    Raises ApiError 400 that names `tools`.
    """
    starts_after = reasoning_end(thinking, tokenizer)
    grammar = tool_spec(use, starts_after)
    if grammar is None and params.grammar is not None:
        grammar = replace(params.grammar, starts_after=starts_after)
    if grammar is not None and not starts_after and thinking.may_begin:
        grammar = behind_optional_reasoning(grammar, thinking.form)
    return replace(params, grammar=grammar)


def tool_spec(use: ToolUse, starts_after: tuple[int, ...] = ()) -> GrammarSpec | None:
    """The grammar of the whole answer: the arguments of the named function, or a list of calls; None asks for none.

    `starts_after`: tokens that end the reasoning in front of it. Raises ApiError 400 that names `tools`.
    """
    if use.choice == "named":
        return json_spec(_arguments(use.tools[0]), param="tools", starts_after=starts_after)
    if use.choice != "required":
        return None
    tags = [
        TaggedSchema(f'{{"name": {json.dumps(tool.name)}, "parameters": ', _arguments(tool), "}") for tool in use.tools
    ]
    most = None if use.is_parallel else 1
    return structured_spec(tags, prefix="[", separator=", ", suffix="]", most=most, starts_after=starts_after)


def _arguments(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object whatever it says."""
    schema = tool.parameters or ANY_OBJECT
    return schema if any(key in schema for key in DESCRIBES_VALUES) else {**ANY_OBJECT, **schema}


def reasoning_end(thinking: Thinking, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Tokens behind which a grammar begins; none where no reasoning has begun, or its end is no token."""
    if not thinking.has_begun:
        return ()
    end = tokenizer.token_id(thinking.form.ends[0])
    return () if end is None else (end,)


def behind_optional_reasoning(grammar: GrammarSpec, form: ReasoningFormat) -> GrammarSpec:
    """The same language, and before it reasoning between its marks, if the model begins with the first of them."""
    if grammar.kind != "ebnf" or grammar.backend != "xgrammar":
        return grammar
    answer = {"type": "grammar", "grammar": grammar.text}
    thoughts = {"type": "tag", "begin": form.begins[0], "content": {"type": "any_text"}, "end": form.ends[0]}
    either = {"type": "or", "elements": [{"type": "sequence", "elements": [thoughts, answer]}, answer]}
    return replace(grammar, kind="structural_tag", text=json.dumps({"type": "structural_tag", "format": either}))
