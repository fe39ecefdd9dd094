"""The subcommands chat and complete: a running server from the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from fuseline.api.config import ConfigError
from fuseline.api.remote import Remote
from fuseline.api.run import Chat, talk


def run_remote_chat(arguments: Sequence[str]) -> int:
    """Entry of `fuseline chat`; returns the exit status."""
    parser = _parser("chat", "answer this message and exit")
    parser.add_argument("--system-prompt", "--system", default="", dest="system", help="system prompt")
    options = parser.parse_args(arguments)
    remote, fields = _remote(options), _fields(options)
    chat = Chat(system=options.system)
    if not options.quick:
        return talk(chat, lambda messages: remote.stream_chat(messages, fields))
    chat.turns.append({"role": "user", "content": options.quick})
    deltas = remote.stream_chat(chat.messages(), fields)
    return _print(lambda: (delta.get("content") or "" for delta in deltas))


def run_complete(arguments: Sequence[str]) -> int:
    """Entry of `fuseline complete`; returns the exit status."""
    options = _parser("complete", "complete this text and exit").parse_args(arguments)
    remote, fields = _remote(options), _fields(options)
    if options.quick:
        return _print(lambda: remote.stream_completion(options.quick, fields))
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() line editing and history)
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if text:
            with suppress(ConfigError):
                _print(lambda text=text: remote.stream_completion(text, fields), is_final=False)


def _parser(command: str, quick: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"fuseline {command}", allow_abbrev=False)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="address of the server, with or without /v1")
    parser.add_argument("--model-name", "--model", default="", dest="model", help="default: the first the server lists")
    parser.add_argument("--api-key", default="", help="default: $FUSELINE_API_KEY")
    parser.add_argument("--max-tokens", type=int, help="longest answer; default: the server's")
    parser.add_argument("--temperature", type=float, help="default: the server's")
    parser.add_argument("-q", "--quick", default="", metavar="TEXT", help=quick)
    return parser


def _remote(options: argparse.Namespace) -> Remote:
    return Remote(options.url, options.model, options.api_key)


def _fields(options: argparse.Namespace) -> dict[str, object]:
    given = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    return {name: value for name, value in given.items() if value is not None}


def _print(stream: Callable, is_final: bool = True) -> int:
    """Print the pieces as they come. A failure is one line: raised as ConfigError where nothing follows."""
    try:
        for piece in stream():
            print(piece, end="", flush=True)
    except (ValueError, OSError) as error:
        if is_final:
            raise ConfigError(str(error)) from error
        print(f"error: {error}", file=sys.stderr)
    print()
    return 0
