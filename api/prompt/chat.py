"""Conversations to prompt text: sandboxed Jinja, compiled once, and the options of a request (SPEC 5, 11)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fuseline.api.config import ConfigError, ServerConfig
from fuseline.api.errors import bad_request
from fuseline.api.prompt.encode import read_text

REFUSED_VARIABLES = ("chat_template", "tokenize")
"""Names in chat_template_kwargs that would change how the server renders, not what the template sees."""
SWITCHES = ("add_generation_prompt", "continue_final_message")


@dataclass(frozen=True)
class RenderedChat:
    """Prompt text of a conversation."""

    text: str
    opens_answer: bool
    """The prompt ends with the beginning of an answer; otherwise the last message is continued or simply ends."""


class ChatRenderer:
    """The conversations of one server as prompt text."""

    def __init__(self, config: ServerConfig, template: ChatTemplate | None, special_tokens: Mapping[str, str]) -> None:
        self._template = template
        self._special_tokens = special_tokens
        self._defaults = dict(config.default_chat_template_kwargs)
        self._max_bytes = config.max_prompt_bytes
        self._hides_tools = config.exclude_tools_when_tool_choice_none

    def render(self, fields: Any) -> RenderedChat:
        """The prompt of a request with ChatFields. Raises ApiError 400."""
        variables = self._variables(fields)
        adds, continues = (bool(variables[name]) for name in SWITCHES)
        messages = prepare_messages([message.model_dump(exclude_none=True) for message in fields.messages])
        text = self._template.render(messages, variables, self._max_bytes)
        return RenderedChat(_cut_after_last(text, messages[-1]) if continues else text, adds and not continues)

    def _variables(self, fields: Any) -> dict[str, Any]:
        """Variables of the template beside the messages."""
        self._check(fields)
        own = fields.chat_template_kwargs or {}
        is_hidden = self._hides_tools and getattr(fields, "tool_choice", None) == "none"
        return {
            **self._special_tokens,
            "tools": None if is_hidden else getattr(fields, "tools", None),
            "documents": getattr(fields, "documents", None),
            **self._defaults,
            **own,
            **self._switches(fields, own),
        }

    def _check(self, fields: Any) -> None:
        if not fields.messages:
            raise bad_request("messages must not be empty", "messages")
        for name in REFUSED_VARIABLES:
            if name in (fields.chat_template_kwargs or ()):
                where = f"chat_template_kwargs.{name}"
                raise bad_request(f"{where} is not accepted in requests by this server", where)
        if fields.chat_template is not None:
            raise bad_request(
                "chat_template is not accepted in requests by this server; start it with --chat-template",
                "chat_template",
            )
        if self._template is None:
            raise bad_request(
                "the model has no chat template: start the server with --chat-template, or use /v1/completions",
                "messages",
            )

    def _switches(self, fields: Any, own: Mapping[str, Any]) -> dict[str, bool]:
        """add_generation_prompt and continue_final_message: of chat_template_kwargs, else the fields, else defaults."""
        found: dict[str, bool | None] = {}
        for name in SWITCHES:
            found[name] = own[name] if name in own else getattr(fields, name)
            if found[name] not in (True, False, None):
                where = f"chat_template_kwargs.{name}"
                raise bad_request(f"{where} must be true or false", where)
        if all(found.values()):
            raise bad_request(
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                "continue_final_message",
            )
        for name, fallback in zip(SWITCHES, (not found["continue_final_message"], False), strict=True):
            if found[name] is None:
                found[name] = bool(self._defaults.get(name, fallback))
        return found


def _cut_after_last(text: str, message: dict[str, Any]) -> str:
    """Leaves the last message open: the text up to the end of its content."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise bad_request("continue_final_message needs a last message with text", "continue_final_message")
    found = text.rfind(content.strip())
    if found < 0:
        raise bad_request(
            "continue_final_message: the template changes the last message's text, so it cannot be continued",
            "continue_final_message",
        )
    return text[: found + len(content.strip())]


class _CodeGenerator(CodeGenerator):
    """Evaluates no expression of the template: a constant one can take time and memory without end ('x' * 10**10)."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator


def environment() -> ImmutableSandboxedEnvironment:
    env = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], optimized=False)
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def _to_json(value: Any, indent: int | None = None, **kwargs: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **kwargs)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """One compiled template. Raises ConfigError for one that does not parse."""

    def __init__(self, text: str, content_format: str = "auto") -> None:
        env = environment()
        try:
            self._template = env.from_string(text)
            detected = detect_content_format(env, text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template does not parse: {error}") from error
        except (SyntaxError, RecursionError, MemoryError) as error:  # of the Python that a template becomes
            message = f"the chat template is nested too deeply or too large to be compiled ({error})"
            raise ConfigError(message) from error
        self.content_format = detected if content_format == "auto" else content_format

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any], max_bytes: int) -> str:
        """`variables` of any names, which never replace the messages. Raises ApiError 400 in the template's words."""
        shaped = [self._shape(message, k) for k, message in enumerate(messages)]
        pieces, left = [], max_bytes
        try:
            for piece in self._template.generate({**variables, "messages": shaped}):
                pieces.append(piece)
                left -= len(piece) if piece.isascii() else len(piece.encode(errors="replace"))
                if left < 0:
                    raise bad_request(
                        f"the chat template renders more than {max_bytes} bytes (--max-prompt-bytes)", "messages"
                    )
        except jinja2.TemplateError as error:
            raise bad_request(f"the chat template refused the messages: {error}", "messages") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise bad_request(f"the chat template failed: {type(error).__name__}: {error}", "messages") from error
        return "".join(pieces)

    def _shape(self, message: dict[str, Any], index: int) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, list):
            parts = [_text_part(part, f"messages[{index}].content[{k}]") for k, part in enumerate(content)]
            if self.content_format == "openai":
                return {**message, "content": [{"type": "text", "text": text} for text in parts]}
            return {**message, "content": "\n".join(parts)}
        if self.content_format == "openai" and isinstance(content, str):
            return {**message, "content": [{"type": "text", "text": content}]}
        return {**message, "content": content if content is not None else ""}


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise bad_request(f"{where} is neither text nor an object", where)
    kind = part.get("type") or next(
        (k for k in ("text", "image_url", "audio_url", "video_url", "input_audio") if k in part), None
    )
    if kind is None:
        raise bad_request("Missing 'type' field in multimodal part.", where)
    if kind in ("text", "refusal"):
        return str(part.get("text") or part.get("refusal") or "")
    raise bad_request(f"{where}: content of type {kind!r} is not supported by this model, which takes text only", where)


def detect_content_format(env: jinja2.Environment, text: str) -> str:
    """openai when the template loops over a message's content, else string."""
    tree = env.parse(text)
    for loop in tree.find_all(nodes.For):
        if any(_is_content(node) for node in [loop.iter, *loop.iter.find_all((nodes.Getattr, nodes.Getitem))]):
            return "openai"
    return "string"


def _is_content(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


def template_text(flag: str, own: str | dict[str, str] | None) -> str | None:
    """--chat-template (a file, a name among the checkpoint's, or the text itself), else the checkpoint's own."""
    if not flag:
        return (own.get("default") or next(iter(own.values()))) if isinstance(own, dict) else own
    if isinstance(own, dict) and flag in own:
        return own[flag]
    if os.path.isfile(flag):
        return read_text(Path(flag))
    if not any(c in flag for c in "{}\n"):
        raise ConfigError(f"--chat-template {flag}: no such file, and it does not look like a template")
    if "\\n" not in flag:
        return flag
    try:
        return flag.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--chat-template holds an escape sequence that stands for no character: {error}") from error


def prepare_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments of earlier tool calls become objects, as templates expect."""
    for k, message in enumerate(messages):
        if thought := message.get("reasoning_content") or message.get("reasoning"):
            message |= {"reasoning_content": thought, "reasoning": thought}  # templates know it by either name
        calls = message.get("tool_calls") or []
        for j, call in enumerate(calls if isinstance(calls, list) else [calls]):
            function = call.get("function") or {} if isinstance(call, dict) else None
            if not isinstance(function, dict):
                where = f"messages[{k}].tool_calls[{j}]"
                raise bad_request(f"{where} is no object with a function object", where)
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                where = f"messages[{k}].tool_calls[{j}].function.arguments"
                try:
                    call["function"]["arguments"] = json.loads(arguments or "{}")
                except ValueError as error:
                    raise bad_request(f"{where} is no valid JSON", where) from error
    return messages
