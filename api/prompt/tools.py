"""Tools of a chat request: what it may call, by its own choice or by the client's (SPEC 9.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fuseline.api.config import ServerConfig
from fuseline.api.errors import bad_request
from fuseline.api.parsers.reasoning import Start
from fuseline.api.parsers.registry import find_reasoning
from fuseline.api.prompt.chat import RenderedChat
from fuseline.api.prompt.prepared import ParseOptions
from fuseline.api.protocol.chat import ChatRequest
from fuseline.api.protocol.common import MAX_NAME, GenerateRequest

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
ANY_OBJECT: dict[str, Any] = {"type": "object"}
DESCRIBES_VALUES = ("type", "$ref", "anyOf", "oneOf", "allOf")
USAGE = 'Correct usage: {"type": "function", "function": {"name": NAME}}'
NEEDS_FLAGS = (
    'tool_choice "auto" needs a server that is started with --enable-auto-tool-choice and --tool-call-parser; '
    'without them "required", a named function and "none" work'
)


@dataclass(frozen=True)
class Tool:
    """A function that may be called."""

    name: str
    parameters: Any
    """JSON schema of its arguments; None takes any object."""
    is_strict: bool = False


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object whatever it says."""
    schema = tool.parameters or ANY_OBJECT
    return schema if any(key in schema for key in DESCRIBES_VALUES) else {**ANY_OBJECT, **schema}


@dataclass(frozen=True)
class ToolUse:
    """Tools of a request and how they are chosen."""

    choice: Literal["none", "auto", "required", "named"] = "none"
    tools: tuple[Tool, ...] = ()
    """For choice named the one function."""
    is_parallel: bool = True
    is_limited: bool = False
    """Others that the model sees may not be called."""


NO_TOOLS = ToolUse()


def read_tools(body: ChatRequest, config: ServerConfig) -> ToolUse:
    """Raises ApiError 400 that names the field."""
    if body.tools is not None and not body.tools:
        raise bad_request("tools must not be an empty list", "tools")
    choice = body.tool_choice
    if choice is not None and choice != "none" and not body.tools:
        raise bad_request("When using `tool_choice`, `tools` must be set.", "tool_choice")
    tools = tuple(_tool(tool, f"tools[{k}]") for k, tool in enumerate(body.tools or ()))
    if choice == "none" or not tools:
        return NO_TOOLS
    is_parallel = body.parallel_tool_calls is not False
    num_shown = len(tools)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed(choice, tools)
    if isinstance(choice, dict):
        named = _named(choice, tools)
        _refuse_guided(body)
        return ToolUse("named", (named,), is_parallel)
    if choice == "required":
        _refuse_guided(body)
        return ToolUse("required", tools, is_parallel)
    if choice not in (None, "auto"):
        words = 'must be "none", "auto", "required" or {"type": "function", "function": {"name": NAME}}'
        raise bad_request(f"tool_choice {words}, not {str(choice)[:50]!r}", "tool_choice", "unsupported_value")
    if not (config.enable_auto_tool_choice and config.tool_call_parser):
        raise bad_request(NEEDS_FLAGS, "tool_choice" if choice else "tools", "unsupported_value")
    return ToolUse("auto", tools, is_parallel, is_limited=len(tools) < num_shown)


def _tool(tool: Mapping[str, Any], where: str) -> Tool:
    if tool.get("type", "function") != "function":
        raise bad_request(f'{where}.type must be "function"', f"{where}.type", "unsupported_value")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise bad_request(f"{where}.function must be an object with a `name`", f"{where}.function")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        words = f"must be text of 1 to {MAX_NAME} characters"
        raise bad_request(f"{where}.function.name {words}", f"{where}.function.name")
    if parameters is not None and not isinstance(parameters, dict):
        raise bad_request(f"{where}.function.parameters must be a JSON schema", f"{where}.function.parameters")
    if function.get("strict") not in (True, False, None):
        raise bad_request(f"{where}.function.strict must be true or false", f"{where}.function.strict")
    if not isinstance(function.get("description", ""), str | None):
        raise bad_request(f"{where}.function.description must be text", f"{where}.function.description")
    return Tool(name, parameters, bool(function.get("strict")))


def _allowed(choice: Mapping[str, Any], tools: tuple[Tool, ...]) -> tuple[tuple[Tool, ...], str]:
    """The tools that may be called, of those that the model sees, and the mode in which they are chosen.

    The fields stand in the object itself, or in its `allowed_tools`.
    """
    where = "tool_choice.allowed_tools" if "allowed_tools" in choice else "tool_choice"
    inner = choice.get("allowed_tools", choice)
    if not isinstance(inner, dict):
        raise bad_request(f"{where} must be an object with `mode` and `tools`", where)
    if inner.get("mode") not in ("auto", "required"):
        raise bad_request(f'{where}.mode must be "auto" or "required"', f"{where}.mode", "unsupported_value")
    given = inner.get("tools")
    if not isinstance(given, list) or not given:
        raise bad_request(f"{where}.tools must be a list that is not empty", f"{where}.tools")
    names = {_allowed_name(tool, f"{where}.tools[{k}]", tools) for k, tool in enumerate(given)}
    return tuple(tool for tool in tools if tool.name in names), inner["mode"]


def _allowed_name(tool: Any, where: str, tools: tuple[Tool, ...]) -> str:
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        raise bad_request(f'{where} must be {{"type": "function", "function": {{"name": NAME}}}}', where)
    inner = tool.get("function", tool)
    name = inner.get("name") if isinstance(inner, dict) else None
    if not any(known.name == name for known in tools):
        words = "The tool specified in `tool_choice` does not match any of the specified `tools`"
        raise bad_request(f"{words}: {str(name)[:100]!r}", where)
    return name


def _named(choice: Mapping[str, Any], tools: tuple[Tool, ...]) -> Tool:
    if choice.get("type", "function") != "function":
        raise bad_request('tool_choice.type must be "function"', "tool_choice.type", "unsupported_value")
    function = choice.get("function")
    if not isinstance(function, dict):
        raise bad_request(f"Expected field `function` in `tool_choice`. {USAGE}", "tool_choice.function")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        words = f"Expected field `name` in `function` in `tool_choice`. {USAGE}"
        raise bad_request(words, "tool_choice.function.name")
    found = next((tool for tool in tools if tool.name == name), None)
    if found is None:
        words = "The tool specified in `tool_choice` does not match any of the specified `tools`"
        raise bad_request(f"{words}: {name[:100]!r}", "tool_choice.function.name")
    return found


def _refuse_guided(body: GenerateRequest) -> None:
    """A response_format says how text looks, of which a forced call has none: it goes with any choice."""
    given = next((name for name in GUIDED if getattr(body, name, None) is not None), None)
    if given:
        raise bad_request("You can only either use guided decoding or tools, not both.", given)


def parse_options(body: ChatRequest, use: ToolUse, rendered: RenderedChat, config: ServerConfig) -> ParseOptions | None:
    """How the answer's text is parsed; None where it is content alone."""
    if use.choice == "none" and not config.reasoning_parser:
        return None
    return ParseOptions(
        tools=tuple((tool.name, tool.parameters) for tool in use.tools),
        choice=use.choice,
        is_parallel=use.is_parallel,
        is_limited=use.is_limited,
        shows_reasoning=body.include_reasoning is not False,
        start=_start(rendered, body, config.reasoning_parser),
    )


def _start(rendered: RenderedChat, body: ChatRequest, parser: str) -> Start:
    """Where the answer begins, as the end of the prompt tells: inside of reasoning or behind it."""
    form = find_reasoning(parser)
    if form is None:
        return ""
    if rendered.opens_answer:
        return form.start(rendered.text)
    content = body.messages[-1].content if body.continue_final_message else None
    return form.start_within(content) if isinstance(content, str) else ""
