"""`fuseline`: serve, run, bench, cache, explain, quantize, version. Exit status 0: done, 2: usage, 1: it failed."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache as once

import fuseline
from fuseline.api import cli_tables as tables
from fuseline.api.cli_parser import COMMANDS, command_parser, parse_values
from fuseline.api.config import ConfigError, read_environment
from fuseline.api.config_resolve import config_dict, resolve


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    arguments = [_dashed(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    command = _main_parser().parse_args(arguments[:1]).command
    try:
        return HANDLERS[command](arguments[1:])
    except ConfigError as error:
        print(f"fuseline: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{text}" for name, text in COMMANDS.items())
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
    name, separator, rest = re.fullmatch(r"([^=.]*)([=.]?)(.*)", argument, re.DOTALL).groups()
    return name.replace("_", "-") + separator + rest


@once
def serve_parser() -> argparse.ArgumentParser:
    parser = command_parser("serve", list(tables.GROUPS))
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as JSON and exit")
    return parser


def serve(arguments: Sequence[str], on_phase: Callable[[str], None] | None = None) -> int:
    """`on_phase` is told when each phase of the start ends."""
    parser = serve_parser()
    values = parse_values(parser, arguments)
    wants_print = values.pop("print_config", False)
    config = resolve(values, read_environment())
    if wants_print:
        from fuseline.api.start_check import try_start

        try_start(config)
        print(json.dumps(config_dict(config), indent=2))
        return 0
    from fuseline.api.cli_log import configure_logging
    from fuseline.api.server import run_server

    configure_logging(config)
    return run_server(config, on_phase)


def explain(arguments: Sequence[str]) -> int:
    config = resolve(parse_values(command_parser("explain", tables.ENGINE_GROUPS), arguments), read_environment())
    from fuseline.compile.report import explain as explain_model

    try:
        print(explain_model(config.engine.compile))
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    return 0


def run(arguments: Sequence[str]) -> int:
    from fuseline.api.run import run_chat

    return run_chat(arguments)


def chat(arguments: Sequence[str]) -> int:
    from fuseline.api.talk import run_remote_chat

    return run_remote_chat(arguments)


def complete(arguments: Sequence[str]) -> int:
    from fuseline.api.talk import run_complete

    return run_complete(arguments)


def run_batch(arguments: Sequence[str]) -> int:
    from fuseline.api.batch import run_batch_file

    return run_batch_file(arguments)


def save_sharded_state(arguments: Sequence[str]) -> int:
    from fuseline.api.save_shards import run_save_shards

    return run_save_shards(arguments)


def collect_env(arguments: Sequence[str]) -> int:
    from fuseline.api.collect_env import run_collect_env

    return run_collect_env(arguments)


def completion(arguments: Sequence[str]) -> int:
    from fuseline.api.completion import run_completion

    return run_completion(arguments)


def bench(arguments: Sequence[str]) -> int:
    from fuseline.api.bench.command import run_bench

    return run_bench(arguments)


def cache(arguments: Sequence[str]) -> int:
    from fuseline.api.cli_cache import run_cache

    return run_cache(arguments)


def quantize(arguments: Sequence[str]) -> int:
    from fuseline.api.quantize import run_quantize

    return run_quantize(arguments)


def version(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="fuseline version").parse_args(arguments)
    print(fuseline.__version__)
    return 0


HANDLERS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve, "run": run, "chat": chat, "complete": complete, "run-batch": run_batch,
    "save-sharded-state": save_sharded_state, "bench": bench, "cache": cache, "explain": explain,
    "quantize": quantize, "collect-env": collect_env, "completion": completion, "version": version,
}  # fmt: skip
