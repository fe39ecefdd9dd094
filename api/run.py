"""`fuseline run`: chat in the terminal, with an engine in this process or (--url) with any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fuseline.api import cli_tables as tables
from fuseline.api.cli_parser import command_parser, parse_values
from fuseline.api.config import ConfigError
from fuseline.api.remote import Remote
from fuseline.api.run_tools import Message, Stream, Tools, answer_with_tools

if TYPE_CHECKING:
    from fuseline.api.llm import LLM

SAMPLING = ("temperature", "max_tokens", "top_p")
Answerer = Callable[[list[Message]], Iterator[str]]
"""Streams the text of the answer to a conversation."""

RUN_GROUPS = (*tables.ENGINE_GROUPS, "chat and answers")
HELP = "/reset starts over, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


def run_chat(arguments: Sequence[str]) -> int:
    """Entry of the subcommand; returns the exit status."""
    parser = command_parser("run", RUN_GROUPS)
    _add_options(parser)
    values = parse_values(parser, arguments)
    options = {name: values.pop(name) for name in ("url", "system", "tools", *SAMPLING)}
    fields = {name: options[name] for name in SAMPLING if options[name] is not None}
    tools = Tools(options["tools"]) if options["tools"] else None
    if tools:
        fields["tools"] = tools.schemas
    chat = Chat(system=options["system"])
    if options["url"]:
        remote = Remote(options["url"], str(values.get("model", "")))
        return talk(chat, lambda messages: remote.stream_chat(messages, fields), tools)
    if tools:
        if not values.get("tool_call_parser"):
            raise ConfigError("--tools needs --tool-call-parser, the format in which the model calls them")
        values["enable_auto_tool_choice"] = True
    with _start(values) as llm:
        return talk(chat, lambda messages: llm.stream_deltas(messages, fields), tools)


def talk(chat: Chat, stream: Stream, tools: Tools | None = None) -> int:
    """A conversation in the terminal, with `tools` for the model to call."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() line editing and history)
    return converse(chat, answer_with_tools(stream, tools, print) if tools else texts(stream))


def texts(stream: Stream) -> Answerer:
    def answer(messages: list[Message]) -> Iterator[str]:
        for delta in stream(messages):
            yield delta.get("content") or ""

    return answer


def _start(values: dict[str, object]) -> LLM:
    from fuseline.api.llm import LLM
    from fuseline.engine.client import EngineStartError

    try:
        return LLM(**{"model": "demo", **values})
    except EngineStartError as error:
        raise ConfigError(str(error)) from error


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("chat")
    words = "address of a running server, with or without /v1, instead of an engine in this process"
    group.add_argument("--url", default="", help=words)
    group.add_argument("--system", default="", help="system prompt")
    group.add_argument("--tools", default="", metavar="FILE", help="Python file of functions that the model may call")
    group.add_argument("--temperature", type=float)
    group.add_argument("--top-p", type=float)
    group.add_argument("--max-tokens", type=int, default=512, help="longest answer (default: 512)")


@dataclass
class Chat:
    """A conversation; the system prompt survives /reset."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]


def converse(chat: Chat, answer: Answerer, read: Callable[[str], str] | None = None) -> int:
    """Read lines and stream answers until /exit or the end of input."""
    print(HELP)
    while True:
        try:
            line = (read or input)("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line == "/exit":
            return 0
        if line == "/reset":
            chat.turns.clear()
            print("(new conversation)")
        elif line.startswith("/"):
            print(HELP)
        elif line:
            _turn(chat, line, answer)


def _turn(chat: Chat, line: str, answer: Answerer) -> None:
    """One question and its answer; an answer cut short by Ctrl-C stays in the conversation as far as it went."""
    chat.turns.append({"role": "user", "content": line})
    text, failure = "", ""
    try:
        for piece in answer(chat.messages()):
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        failure = "(stopped)"
    except (ConfigError, ValueError, RuntimeError, OSError) as error:
        failure = f"error: {error}"
    print()
    if failure:
        print(failure, file=sys.stderr)
    if text:
        chat.turns.append({"role": "assistant", "content": text})
    else:
        chat.turns.pop()
