"""`fuseline`: serve, run, bench, explain, version. Exit status 0: done, 2: usage, 1: a configuration that fails."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

import fuseline
from fuseline.api import cli_tables as tables
from fuseline.api.cli_flags import add_flags
from fuseline.api.cli_yaml import read_arguments
from fuseline.api.config import ConfigError, ServerConfig, read_environment
from fuseline.api.config_resolve import config_dict, resolve

COMMANDS = {
    "serve": "serve a model over the OpenAI API",
    "run": "chat with a model in the terminal",
    "bench": "measure: `fuseline bench serve` loads any OpenAI-compatible server",
    "explain": "show how a model is captured, transformed and lowered",
    "version": "print the version",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    arguments = [_dashed(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    parser = _main_parser()
    chosen, rest = parser.parse_known_args(arguments[:1]), arguments[1:]
    try:
        return HANDLERS[chosen[0].command](rest)
    except ConfigError as error:
        print(f"fuseline: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _main_parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<9}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="fuseline",
        usage="fuseline COMMAND [options]",
        description="An LLM serving engine that compiles Transformers models.",
        epilog=f"commands:\n{commands}\n\nfuseline COMMAND --help shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="what to do")
    parser.add_argument("--version", "-v", action="version", version=f"fuseline {fuseline.__version__}")
    return parser


def _dashed(argument: str) -> str:
    """In names `_` and `-` are the same."""
    if not argument.startswith("--"):
        return argument
    name, separator, value = argument.partition("=")
    return name.replace("_", "-") + separator + value


class HelpFormatter(argparse.HelpFormatter):
    """Room for long flag names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def command_parser(command: str, groups: Sequence[str], with_rest: bool = True) -> argparse.ArgumentParser:
    """Parser of a command that takes a model and its flags."""
    parser = argparse.ArgumentParser(
        prog=f"fuseline {command}",
        usage=f"fuseline {command} [MODEL] [options]",
        description=COMMANDS[command],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        epilog="All flags, also those of later parts: docs/FLAGS.md.",
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="checkpoint directory; wins over --model")
    parser.add_argument("--config", action="append", metavar="FILE", help="YAML file of flags; the command line wins")
    add_flags(parser, groups, with_rest)
    return parser


def parse_values(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, object]:
    """Values by field name from the command line and, below it, from --config."""
    line = vars(parser.parse_args(arguments))
    files = line.pop("config") or []
    if len(files) > 1:
        raise ConfigError("--config is given more than once; one file holds all")
    values = vars(parser.parse_args(_file_arguments(parser, files[0]))) if files else {}
    values = {name: value for name, value in values.items() if value is not None} | line
    model = values.pop("positional_model", None)
    values.pop("config", None)
    return values | ({"model": model} if model else {})


def _file_arguments(parser: argparse.ArgumentParser, file: str) -> list[str]:
    arguments = read_arguments(file)
    if any(argument.partition("=")[0] == "--config" for argument in arguments):
        parser.error("a configuration file cannot name another (config)")
    return arguments


def server_config(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> ServerConfig:
    return resolve(parse_values(parser, arguments), read_environment())


def serve(arguments: Sequence[str]) -> int:
    parser = command_parser("serve", list(tables.GROUPS))
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as JSON and exit")
    values = parse_values(parser, arguments)
    wants_print = values.pop("print_config", False)
    config = resolve(values, read_environment())
    if wants_print:
        print(json.dumps(config_dict(config), indent=2))
        return 0
    from fuseline.api.cli_log import configure_logging
    from fuseline.api.server import run_server

    configure_logging(config)
    return run_server(config)


def explain(arguments: Sequence[str]) -> int:
    config = server_config(command_parser("explain", tables.ENGINE_GROUPS), arguments)
    from fuseline.compile.report import explain as explain_model

    print(explain_model(config.engine.compile))
    return 0


def run(arguments: Sequence[str]) -> int:
    from fuseline.api.run import run_chat

    return run_chat(arguments)


def bench(arguments: Sequence[str]) -> int:
    from fuseline.api.bench.command import run_bench

    return run_bench(arguments)


def version(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="fuseline version").parse_args(arguments)
    print(fuseline.__version__)
    return 0


HANDLERS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve, "run": run, "bench": bench, "explain": explain, "version": version,
}  # fmt: skip
