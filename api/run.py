"""`fuseline run`: chat in the terminal, with an engine in this process or (--url) with any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fuseline.api import cli_tables as tables
from fuseline.api.cli_parser import command_parser, parse_values
from fuseline.api.config import ConfigError, read_environment
from fuseline.api.server_url import server_root

if TYPE_CHECKING:
    from fuseline.api.llm import LLM

Message = dict[str, str]
Answerer = Callable[[list[Message]], Iterator[str]]
"""Streams the text of the answer to a conversation."""

HELP = "/reset starts over, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


def run_chat(arguments: Sequence[str]) -> int:
    """Entry of the subcommand; returns the exit status."""
    parser = command_parser("run", tables.ENGINE_GROUPS)
    _add_options(parser)
    values = parse_values(parser, arguments)
    options = {name: values.pop(name) for name in ("url", "system", "temperature", "max_tokens", "top_p")}
    sampling = {name: options[name] for name in ("temperature", "max_tokens", "top_p") if options[name] is not None}
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() line editing and history)
    chat = Chat(system=options["system"])
    if options["url"]:
        return converse(chat, _url_answerer(server_root(options["url"]), str(values.get("model", "")), sampling))
    with _start(values) as llm:
        return converse(chat, lambda messages: llm.stream_chat(messages, sampling))


def _start(values: dict[str, object]) -> LLM:
    from fuseline.api.llm import LLM
    from fuseline.engine.client import EngineStartError

    try:
        return LLM(**{"model": "demo", **values})
    except EngineStartError as error:
        raise ConfigError(str(error)) from error


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("chat")
    group.add_argument("--url", default="", help="address of a running server instead of an engine in this process")
    group.add_argument("--system", default="", help="system prompt")
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


def _url_answerer(url: str, model: str, sampling: dict[str, object]) -> Answerer:
    def answer(messages: list[Message]) -> Iterator[str]:
        yield from stream_url(url, model, messages, sampling)

    return answer


def stream_url(url: str, model: str, messages: list[Message], sampling: dict[str, object]) -> Iterator[str]:
    """Text of a streamed /v1/chat/completions answer. Raises OSError or ValueError with the server's words."""
    with _open(f"{url}/v1/models") as response:
        model = model or json.load(response)["data"][0]["id"]
    body = {"model": model, "messages": messages, "stream": True, **sampling}
    with _open(f"{url}/v1/chat/completions", body) as response:
        for line in response:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            event = json.loads(line[5:])
            if "error" in event:
                raise ValueError(event["error"]["message"])
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""


def _open(url: str, body: dict[str, object] | None = None):  # noqa: ANN202 (urllib's response has no public type)
    import urllib.error
    import urllib.request

    headers = {"Content-Type": "application/json"}
    if key := read_environment().api_key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=600)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        raise ValueError(f"{url}: {error.code} {text[:500]}") from error
    except urllib.error.URLError as error:
        raise OSError(f"{url} does not answer ({error.reason}); is the server up?") from error
