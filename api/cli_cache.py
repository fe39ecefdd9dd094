"""`fuseline cache list|clear`: what is kept of models that have been served, so that the next start is short."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from fuseline.api.config import ConfigError, read_environment
from fuseline.compile.cache.files import KINDS, MAX_BYTES, Entry, clear, entries
from fuseline.compile.target import default_cache_dir


def run_cache(arguments: Sequence[str]) -> int:
    """Entry of the subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fuseline cache", allow_abbrev=False)
    parser.add_argument("action", choices=("list", "clear"), help="show what is cached, or remove it all")
    parser.add_argument("--cache-dir", default="", help="default: $FUSELINE_CACHE_ROOT or ~/.cache/fuseline")
    options = parser.parse_args(arguments)
    root = Path(options.cache_dir or read_environment().cache_root or default_cache_dir())
    if options.action == "list":
        print(table(root, entries(root)))
        return 0
    try:
        removed = clear(root)
    except OSError as error:
        raise ConfigError(f"{root} cannot be cleared: {error}") from error
    print(f"{len(removed)} files removed from {root}, {megabytes(sum(e.num_bytes for e in removed))}")
    return 0


def table(root: Path, found: Sequence[Entry]) -> str:
    """One line a file, last used first."""
    lines = [
        f"{entry.kind + '/' + entry.path.name[:12]:<24}{megabytes(entry.num_bytes):>12}  "
        f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(entry.used))}  {KINDS[entry.kind]}"
        for entry in found
    ]
    total = sum(entry.num_bytes for entry in found)
    return "\n".join([*lines, f"{len(found)} files, {megabytes(total)} of at most {megabytes(MAX_BYTES)} in {root}"])


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
