"""`fuseline save-sharded-state MODEL -o DIR`: a checkpoint whose weights --load-format sharded_state reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fuseline.api.cli_flags import human_int
from fuseline.api.cli_parser import command_parser, parse_values
from fuseline.api.config import ConfigError, ServerConfig, read_environment
from fuseline.api.config_resolve import resolve
from fuseline.compile.load_format import SHARD_PATTERN, wrong_extra

SHARD_GROUPS = ("model",)
MAX_FILE_SIZE = 5 * 2**30


def run_save_shards(arguments: Sequence[str]) -> int:
    """Entry of the subcommand; returns the exit status. Raises ConfigError."""
    parser = command_parser("save-sharded-state", SHARD_GROUPS)
    group = parser.add_argument_group("files")
    group.add_argument("-o", "--output", required=True, metavar="DIR", help="directory to write; not the model's")
    group.add_argument("--file-pattern", default=SHARD_PATTERN, metavar="NAME", help="names of the files of weights")
    group.add_argument(
        "--max-file-size", type=human_int, default=MAX_FILE_SIZE, metavar="BYTES", help="size of a file; 5G is 5 GiB"
    )
    values = parse_values(parser, arguments)
    output, pattern = Path(str(values.pop("output"))), str(values.pop("file_pattern"))
    max_size = int(values.pop("max_file_size"))
    files = save_shards(resolve(values, read_environment()), output, pattern, max_size)
    print(f"{len(files)} files of weights are in {output}", file=sys.stderr)
    return 0


def save_shards(
    config: ServerConfig, output: Path, pattern: str = SHARD_PATTERN, max_size: int = MAX_FILE_SIZE
) -> list[Path]:
    """Write the weights of a checkpoint by rank, and its other files beside them. Returns the files of weights.

    Raises ConfigError.
    """
    from fuseline.compile.capture.errors import LoadError
    from fuseline.compile.capture.load_formats import open_weights
    from fuseline.compile.capture.sharded_state import save_sharded_state
    from fuseline.compile.checkpoint_writer.others import copy_others

    compiling, source = config.engine.compile, Path(config.engine.compile.model)
    if compiling.load_format in ("dummy", "gguf"):
        raise ConfigError(f"--load-format {compiling.load_format}: its weights cannot be saved so")
    if reason := wrong_extra("sharded_state", {"pattern": pattern}):
        raise ConfigError(f"--file-pattern: {reason}")
    if max_size < 1:
        raise ConfigError(f"--max-file-size {max_size}: must be at least 1")
    if output.resolve() == source.resolve():
        raise ConfigError(f"--output {output}: is the model's own directory; give another one")
    try:
        output.mkdir(parents=True, exist_ok=True)
        files = save_sharded_state(open_weights(compiling), output, pattern, max_size)
        for folder in (Path(config.tokenizer_dir), source, Path(compiling.config_dir)):
            copy_others(folder, output)
    except (LoadError, OSError) as error:
        raise ConfigError(str(error)) from error
    return files
