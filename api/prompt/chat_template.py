"""Conversations to prompt text: sandboxed Jinja, compiled once (SPEC 11)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fuseline.api.config import ConfigError
from fuseline.api.errors import bad_request


def environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
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
        self.content_format = detected if content_format == "auto" else content_format

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """`variables` of any names, which never replace the messages. Raises ApiError 400 in the template's words."""
        shaped = [self._shape(message, k) for k, message in enumerate(messages)]
        try:
            return self._template.render({**variables, "messages": shaped})
        except jinja2.TemplateError as error:
            raise bad_request(f"the chat template refused the messages: {error}", "messages") from error
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise bad_request(f"the chat template failed: {type(error).__name__}: {error}", "messages") from error

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
    if Path(flag).is_file():
        return Path(flag).read_text()
    if not any(c in flag for c in "{}\n"):
        raise ConfigError(f"--chat-template {flag}: no such file, and it does not look like a template")
    return flag.encode().decode("unicode_escape") if "\\n" in flag else flag


def prepare_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments of earlier tool calls become objects, as templates expect."""
    for k, message in enumerate(messages):
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
