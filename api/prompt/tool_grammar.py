"""The grammar that a request's tools make of its answer (SPEC 9.1)."""

from __future__ import annotations

import json
from typing import Any

from fuseline.api.config import ServerConfig
from fuseline.api.parsers.reasoning import ReasoningFormat, Start
from fuseline.api.parsers.registry import find_reasoning
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.api.prompt.grammar import TaggedSchema, json_spec, structured_spec
from fuseline.api.prompt.tools import Tool, ToolUse
from fuseline.api.protocol.chat import ChatRequest
from fuseline.engine.messages import GrammarSpec

ANY_OBJECT: dict[str, Any] = {"type": "object"}
DESCRIBES_VALUES = ("type", "$ref", "anyOf", "oneOf", "allOf")


def answer_grammar(
    body: ChatRequest, use: ToolUse, start: Start, config: ServerConfig, tokenizer: TextTokenizer
) -> GrammarSpec | None:
    """The grammar of an answer that must be calls, behind its reasoning. Raises ApiError 400."""
    variables = {**dict(config.default_chat_template_kwargs), **(body.chat_template_kwargs or {})}
    is_asked = any(variables.get(name) is True for name in ("enable_thinking", "thinking"))
    return tool_spec(use, reasoning_end(find_reasoning(config.reasoning_parser), start, is_asked, tokenizer))


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


def reasoning_end(
    form: ReasoningFormat | None, start: Start, is_asked: bool, tokenizer: TextTokenizer
) -> tuple[int, ...]:
    """Tokens behind which a grammar begins; none where the answer may come without reasoning, or its end is no token.

    `is_asked`: the request has asked the template for reasoning.
    """
    if form is None or start == "closed" or not (start == "open" or form.is_assumed or is_asked):
        return ()
    end = tokenizer.token_id(form.ends[0])
    return () if end is None else (end,)
