"""Conversations to prompt text: which template, which variables, and an answer that is begun (SPEC 5, 11)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuseline.api.config import ConfigError, ServerConfig
from fuseline.api.errors import bad_request
from fuseline.api.prompt.control_tokens import ControlTokens, Spans
from fuseline.api.prompt.encode import TextTokenizer, read_text
from fuseline.api.prompt.template import ChatTemplate

REFUSED_VARIABLES = ("chat_template", "tokenize")
"""Names in chat_template_kwargs that would change how the server renders, not what the template sees."""
SWITCHES = ("add_generation_prompt", "continue_final_message")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; templates read the first, those of gpt-oss the second."""
REFUSED = {
    "function_call": "it has become `tool_calls`; send those",
    "audio": "this model takes text only",
}
"""Known fields of a message with nothing here that could heed them -> why."""
END = "\ue003end of the last message\ue003"
"""Stands behind the text of a message that is continued while it is rendered."""


@dataclass(frozen=True)
class RenderedChat:
    """Prompt text of a conversation."""

    text: str
    opens_answer: bool
    """The prompt ends with the beginning of an answer; otherwise the last message is continued or simply ends."""
    literals: Spans = ()
    """Where the text spells control tokens that the conversation, and not the template, has written."""
    last_text: str = ""
    """Text of the last message."""


class ChatRenderer:
    """The conversations of one server as prompt text. Raises ConfigError for a template that does not parse."""

    def __init__(
        self, config: ServerConfig, template: str | None, named: Mapping[str, str], tokenizer: TextTokenizer | None
    ) -> None:
        """`named`: templates of the checkpoint beside the server's own."""
        self._config, self._named, self._tokenizer = config, named, tokenizer
        self._defaults = dict(config.default_chat_template_kwargs)
        self._compiled: dict[str, tuple[ChatTemplate, ControlTokens]] = {}
        self._text = template
        self.template = self._compile(template)[0] if template else None
        """The server's own."""

    def render(self, fields: Any) -> RenderedChat:
        """The prompt of a request with ChatFields. Raises ApiError 400."""
        self._check(fields)
        kwargs = fields.chat_template_kwargs or {}
        switches = self._switches(fields, kwargs)
        template, controls = self._choose(fields)
        messages = template.shape(prepare_messages([m.model_dump(exclude_none=True) for m in fields.messages]))
        continues = switches["continue_final_message"]
        if continues and not fields.messages[-1].content and fields.messages[-1].content != "":
            raise bad_request("continue_final_message needs a last message with text", "continue_final_message")
        own = self._own_variables(fields, kwargs)
        common = {**(self._tokenizer.special_tokens if self._tokenizer else {}), **self._defaults}

        def draw(messages: list[dict[str, Any]], own: Mapping[str, Any]) -> str:
            return self._draw(template, messages, {**common, **own, **switches}, continues)

        text, literals = draw(messages, own), ()
        if marked := controls.mark(messages, own):
            text, literals = controls.find(text, draw(*marked))
        opens = switches["add_generation_prompt"] and not continues
        return RenderedChat(text, opens, literals, _text_of(messages[-1]))

    def _draw(
        self, template: ChatTemplate, messages: list[dict[str, Any]], variables: Mapping[str, Any], continues: bool
    ) -> str:
        limit = self._config.max_prompt_bytes
        try:
            if not continues:
                return template.render(messages, variables, limit)
            begun, last = _with_end(messages[-1])
            return _cut(template.render([*messages[:-1], last], variables, limit + len(END)), begun)
        except RecursionError as error:
            raise bad_request("the chat template recurses too deeply over these messages", "messages") from error

    def _own_variables(self, fields: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Variables of the template that the request gives."""
        effort = getattr(fields, "reasoning_effort", None)
        found: dict[str, Any] = {"tools": self._tools(fields), "documents": getattr(fields, "documents", None)}
        if effort is not None:
            found["reasoning_effort"] = effort
            if effort == "none":
                found["enable_thinking"] = False
        return {**found, **kwargs}

    def _tools(self, fields: Any) -> list[dict[str, Any]] | None:
        hides = self._config.exclude_tools_when_tool_choice_none and getattr(fields, "tool_choice", None) == "none"
        return None if hides else getattr(fields, "tools", None)

    def _choose(self, fields: Any) -> tuple[ChatTemplate, ControlTokens]:
        """The request's template, by its name or its text; else that for tools where it has any; else the server's."""
        asked = fields.chat_template
        if asked is not None and asked not in self._named:
            try:
                return self._build(asked)  # not kept: others are as many as requests
            except ConfigError as error:
                raise bad_request(f"chat_template: {error}", "chat_template") from error
        if asked is None and not self._config.chat_template and self._tools(fields) and "tool_use" in self._named:
            asked = "tool_use"
        try:
            return self._compile(self._text if asked is None else self._named[asked])
        except ConfigError as error:
            raise bad_request(f"the template {asked}: {error}", "chat_template") from error

    def _compile(self, text: str) -> tuple[ChatTemplate, ControlTokens]:
        if text not in self._compiled:
            self._compiled[text] = self._build(text)
        return self._compiled[text]

    def _build(self, text: str) -> tuple[ChatTemplate, ControlTokens]:
        template = ChatTemplate(text, self._config.chat_template_content_format)
        added = self._tokenizer.added_tokens if self._tokenizer else {}
        listed = self._tokenizer.control_tokens if self._tokenizer else None
        written = template.literals if listed is None else "\0".join(listed)
        markers = [name for name, is_special in added.items() if not is_special and name.strip() and name in written]
        return template, ControlTokens([name for name, is_special in added.items() if is_special], markers)

    def _check(self, fields: Any) -> None:
        if not fields.messages:
            raise bad_request("messages must not be empty", "messages")
        for name in REFUSED_VARIABLES:
            if name in (fields.chat_template_kwargs or ()):
                where = f"chat_template_kwargs.{name}"
                raise bad_request(f"{where} is not accepted in requests by this server", where)
        asked = fields.chat_template
        if asked is not None and asked not in self._named and not self._config.trust_request_chat_template:
            raise bad_request(
                "chat_template is not accepted in requests by this server; start it with --chat-template, or with "
                "--trust-request-chat-template",
                "chat_template",
            )
        if asked is None and self.template is None:
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


def _text_of(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _with_end(message: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text that is continued, and the message with END behind it."""
    content = message["content"]
    if isinstance(content, str):
        return content, {**message, "content": content + END}
    *parts, last = content
    return last["text"], {**message, "content": [*parts, {**last, "text": last["text"] + END}]}


def _cut(text: str, begun: str) -> str:
    """The prompt up to the end of the text that is continued, which stays as it is to the letter.

    What a template trims of it at its beginning comes back; END guards the other side.
    """
    text, found, _ = text.rpartition(END)
    trimmed = begun.lstrip()
    if found and text.endswith(begun):
        return text
    if found and text.endswith(trimmed):
        return text[: len(text) - len(trimmed)] + begun
    raise bad_request(
        "continue_final_message: the template changes the last message's text, so it cannot be continued",
        "continue_final_message",
    )


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


def named_templates(tokenizer: TextTokenizer | None) -> dict[str, str]:
    """The checkpoint's templates by name, where it has several."""
    own = tokenizer.chat_template if tokenizer else None
    return own if isinstance(own, dict) else {}


def prepare_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier turns as templates expect them: arguments of tool calls are objects, no calls are no key."""
    for k, message in enumerate(messages):
        for name, why in REFUSED.items():
            if message.get(name):
                where = f"messages[{k}].{name}"
                raise bad_request(f"{where} is not supported: {why}", where, "unsupported_value")
        if message.get("tool_calls") == []:
            del message["tool_calls"]
        calls = message.get("tool_calls") or []
        for j, call in enumerate(calls if isinstance(calls, list) else [calls]):
            _parse_arguments(call, f"messages[{k}].tool_calls[{j}]")
        reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
        if reasoning is not None:
            message |= {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return messages


def _parse_arguments(call: Any, where: str) -> None:
    function = call.get("function") or {} if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise bad_request(f"{where} is no object with a function object", where)
    arguments = function.get("arguments")
    if arguments is None and function:
        function["arguments"] = {}
    elif isinstance(arguments, str):
        function["arguments"] = read_arguments(arguments, f"{where}.function.arguments")


def read_arguments(text: str, where: str) -> Any:
    """Arguments of an earlier call. Raises ApiError 400."""
    try:
        return json.loads(text or "{}")
    except ValueError as error:
        raise bad_request(f"{where} is no valid JSON", where) from error
