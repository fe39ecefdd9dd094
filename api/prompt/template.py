"""A chat template: sandboxed Jinja as Transformers runs it, compiled once, within bounds (SPEC 11)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fuseline.api.config import ConfigError
from fuseline.api.errors import ApiError, bad_request
from fuseline.api.prompt.content_format import detect_content_format
from fuseline.api.prompt.media import unsupported_kind

PARTS = ("text", "image_url", "audio_url", "video_url", "input_audio", "file", "image", "audio", "video")
"""Keys that say what a part without a type is."""


class Generation(Extension):
    """`{% generation %}` blocks, which tell trainers what the model has written: here their text alone."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return caller()


class _CodeGenerator(CodeGenerator):
    """Evaluates no expression of the template: a constant one can take time and memory without end ('x' * 10**10)."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator


def environment() -> ImmutableSandboxedEnvironment:
    env = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], optimized=False)
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The arguments, in their order, are those that Transformers gives it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """One compiled template. Raises ConfigError for one that does not parse."""

    def __init__(self, text: str, content_format: str = "auto") -> None:
        env = environment()
        try:
            self._template = env.from_string(text)
            tree = env.parse(text)
            self.detected_format = detect_content_format(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template does not parse: {error}") from error
        except (SyntaxError, RecursionError, MemoryError) as error:  # of the Python that a template becomes
            message = f"the chat template is nested too deeply or too large to be compiled ({error})"
            raise ConfigError(message) from error
        self.content_format = self.detected_format if content_format == "auto" else content_format
        self.literals = _literals(tree)
        """Text that the template itself writes, in pieces that a NUL divides."""

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any], max_bytes: int) -> str:
        """`variables` of any names, which never replace the messages; messages as `shape` makes them.

        Raises ApiError 400 in the template's words.
        """
        pieces, left = [], max_bytes
        try:
            for piece in self._template.generate({**variables, "messages": messages}):
                pieces.append(piece)
                left -= len(piece) if piece.isascii() else len(piece.encode(errors="replace"))
                if left < 0:
                    raise bad_request(
                        f"the chat template renders more than {max_bytes} bytes (--max-prompt-bytes)", "messages"
                    )
        except jinja2.TemplateError as error:
            raise bad_request(f"the chat template refused the messages: {error}", "messages") from error
        except (ApiError, MemoryError, RecursionError):
            raise
        except Exception as error:  # filters raise what they like
            raise bad_request(f"the chat template failed: {type(error).__name__}: {error}", "messages") from error
        return "".join(pieces)

    def shape(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with their content in the form that the template takes. Raises ApiError 400."""
        return [{**message, "content": self._content(message, k)} for k, message in enumerate(messages)]

    def _content(self, message: dict[str, Any], index: int) -> str | list[dict[str, Any]]:
        content = message.get("content")
        takes_parts = self.content_format == "openai"
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if takes_parts else content
        found = [_text_part(part, f"messages[{index}].content[{k}]") for k, part in enumerate(content or ())]
        return found if takes_parts else "\n".join(part["text"] for part in found)


def _text_part(part: Any, where: str) -> dict[str, Any]:
    """A part of text, with whatever else its client has given it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise bad_request(f"{where} is neither text nor an object", where)
    kind = part.get("type") or next((k for k in PARTS if k in part), None)
    if kind is None:
        raise bad_request("Missing 'type' field in multimodal part.", where)
    if kind in ("text", "refusal"):
        return {**part, "type": "text", "text": str(part.get("text") or part.get("refusal") or "")}
    raise bad_request(f"{where}: {unsupported_kind(kind)}", where, "unsupported_value")


def _literals(tree: nodes.Template) -> str:
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts)
