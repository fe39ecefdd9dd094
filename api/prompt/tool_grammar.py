"""The grammar that a request's tools make of its answer (SPEC 9.1)."""

from __future__ import annotations

import json
from typing import Any

from msgspec.structs import replace

from fuseline.api.config import ServerConfig
from fuseline.api.parsers.reasoning import Start
from fuseline.api.parsers.registry import find_reasoning
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.grammar import TaggedSchema, json_spec, structured_spec
from fuseline.api.prompt.tools import Tool, ToolUse
from fuseline.api.protocol.chat import ChatRequest
from fuseline.engine.messages import GrammarSpec, SamplingParams

ANY_OBJECT: dict[str, Any] = {"type": "object"}
DESCRIBES_VALUES = ("type", "$ref", "anyOf", "oneOf", "allOf")


def with_grammar(params: SamplingParams, use: ToolUse, starts_after: tuple[int, ...]) -> SamplingParams:
    """The parameters with the grammar of the request's tools, or with its own, behind the reasoning."""
    grammar = tool_spec(use, starts_after)
    if grammar is None and params.grammar is not None:
        grammar = replace(params.grammar, starts_after=starts_after)
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


def reasoning_end(body: ChatRequest, start: Start, config: ServerConfig, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Tokens behind which a grammar begins; none where the answer may come without reasoning, or its end is no token.

    `start`: where the prompt leaves the answer.
    """
    form = find_reasoning(config.reasoning_parser)
    variables = {**dict(config.default_chat_template_kwargs), **(body.chat_template_kwargs or {})}
    is_asked = any(variables.get(name) is True for name in ("enable_thinking", "thinking"))
    if form is None or start == "closed" or not (start == "open" or form.is_assumed or is_asked):
        return ()
    end = tokenizer.token_id(form.ends[0])
    return () if end is None else (end,)
