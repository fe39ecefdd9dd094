"""`fuseline completion bash`: a completion script made from the parsers of the commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fuseline.api import cli_tables as tables
from fuseline.api.batch import BATCH_GROUPS
from fuseline.api.cli_parser import COMMANDS, command_parser
from fuseline.api.config import ConfigError
from fuseline.api.run import RUN_GROUPS
from fuseline.api.save_shards import SHARD_GROUPS

SHELLS = ("bash", "zsh", "tcsh", "fish")
GROUPS: dict[str, Sequence[str]] = {
    "serve": list(tables.GROUPS), "run": RUN_GROUPS, "explain": tables.ENGINE_GROUPS,
    "run-batch": BATCH_GROUPS, "save-sharded-state": SHARD_GROUPS,
}  # fmt: skip
"""Commands that take a model, with the groups of their flags."""


def run_completion(arguments: Sequence[str]) -> int:
    """Entry of the subcommand; returns the exit status."""
    usage = 'for bash: eval "$(fuseline completion bash)"'
    parser = argparse.ArgumentParser(prog="fuseline completion", description=usage)
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args(arguments).shell
    try:
        import shtab
    except ImportError as error:
        raise ConfigError("completion needs the package shtab: pip install 'fuseline[completion]'") from error
    print(shtab.complete(main_parser(), shell))
    return 0


def main_parser() -> argparse.ArgumentParser:
    """All commands as one parser; nothing is parsed with it."""
    parser = argparse.ArgumentParser(prog="fuseline")
    commands = parser.add_subparsers(dest="command")
    for name, text in COMMANDS.items():
        parents = [command_parser(name, GROUPS[name], add_help=False)] if name in GROUPS else []
        made = commands.add_parser(name, help=text, parents=parents)
        if name == "completion":
            made.add_argument("shell", choices=SHELLS)
    return parser
