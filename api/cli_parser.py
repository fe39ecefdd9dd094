"""The parser of a command that takes a model and its flags, and the values it yields."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

from fuseline.api.cli_dotted import fold_dotted
from fuseline.api.cli_flags import add_flags
from fuseline.api.cli_yaml import read_arguments
from fuseline.api.config import ConfigError

COMMANDS = {
    "serve": "serve a model over the OpenAI API",
    "run": "chat with a model in the terminal",
    "chat": "chat with a running server in the terminal",
    "complete": "complete texts with a running server",
    "run-batch": "answer the requests of an OpenAI batch file",
    "save-sharded-state": "write a checkpoint for --load-format sharded_state",
    "bench": "measure: `serve` any OpenAI-compatible server, `offline` an engine, `startup` a start, `kernels`",
    "cache": "list or clear what is kept for the next start",
    "explain": "show how a model is captured, transformed and lowered",
    "quantize": "write a checkpoint of fewer bits, and show what it loses",
    "collect-env": "print what a report of a fault should tell of this machine",
    "completion": "print the completion script of a shell: bash, zsh, tcsh, fish",
    "version": "print the version",
}


class HelpFormatter(argparse.HelpFormatter):
    """Room for long flag names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


class Parser(argparse.ArgumentParser):
    """Names the nearest flag when one is unknown."""

    def parse_args(self, args=None, namespace=None):  # noqa: ANN001, ANN201 (argparse's own signature)
        known, extra = self.parse_known_args(args, namespace)
        if extra:
            self.error(f"unrecognized arguments: {' '.join(extra)}{self._nearest(extra)}")
        return known

    def _nearest(self, extra: Sequence[str]) -> str:
        unknown = next((text.partition("=")[0] for text in extra if text.startswith("--")), "")
        near = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
        return f" (did you mean {near[0]}?)" if near else ""


def command_parser(command: str, groups: Sequence[str], add_help: bool = True) -> Parser:
    """Parser of a command that takes a model and its flags."""
    parser = Parser(
        prog=f"fuseline {command}",
        usage=f"fuseline {command} [MODEL] [options]",
        description=COMMANDS.get(command),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=add_help,
        epilog="All flags, also those of later parts: docs/FLAGS.md.",
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="checkpoint directory; wins over --model")
    parser.add_argument("--config", action="append", metavar="FILE", help="YAML file of flags; the command line wins")
    add_flags(parser, groups)
    return parser


def help_of(parser: Parser, word: str) -> str:
    """--help=WORD: the flags of a group, or whose name holds the word; all of them for `all`."""
    wanted = word.strip("-").replace("_", "-").lower()
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        is_whole = wanted in ("all", str(group.title).lower())
        found = [action for action in group._group_actions if is_whole or wanted in " ".join(action.option_strings)]
        formatter.start_section(group.title)
        formatter.add_arguments(found)
        formatter.end_section()
    return formatter.format_help() or f"no flag and no group of flags is called {word!r}\n"


def parse_values(parser: Parser, arguments: Sequence[str]) -> dict[str, object]:
    """Values by field name from the command line and, below it, from --config."""
    if word := next((text.partition("=")[2] for text in arguments if text.startswith("--help=")), ""):
        print(help_of(parser, word), end="")
        parser.exit()
    line = vars(parser.parse_args(fold_dotted(arguments)))
    files = line.pop("config") or []
    if len(files) > 1:
        raise ConfigError("--config is given more than once; one file holds all")
    values = vars(parser.parse_args(_file_arguments(parser, files[0]))) if files else {}
    values = {name: value for name, value in values.items() if value is not None} | line
    model = values.pop("positional_model", None)
    values.pop("config", None)
    return values | ({"model": model} if model else {})


def _file_arguments(parser: Parser, file: str) -> list[str]:
    arguments = read_arguments(file)
    if any(argument.partition("=")[0] == "--config" for argument in arguments):
        parser.error("a configuration file cannot name another (config)")
    return arguments
