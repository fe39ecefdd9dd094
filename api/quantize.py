"""`fuseline quantize MODEL --to int4`: a checkpoint of fewer bits, and what it loses."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fuseline.api.cli_parser import COMMANDS, HelpFormatter
from fuseline.api.config import ConfigError, find_checkpoint
from fuseline.api.progress import StartupProgress

TARGETS = {
    "int4": "groups of 32, the scales of least error", "int8": "groups of 128", "fp8": "e4m3, a scale an output",
}  # fmt: skip


def run_quantize(arguments: Sequence[str]) -> int:
    """Entry of the subcommand; returns the exit status."""
    options = _parser().parse_args(arguments)
    output = Path(options.output or f"{Path(options.model).name}-{options.to}")
    from fuseline.compile.capture.errors import CaptureError, LoadError
    from fuseline.compile.checkpoint_writer.measure import measure, table
    from fuseline.compile.checkpoint_writer.plan import HEAD, make_plan
    from fuseline.compile.checkpoint_writer.write import write_quantized
    from fuseline.compile.config import CompileConfig

    progress = StartupProgress()
    try:
        if output.exists():
            raise ConfigError(f"--output {output}: it is there already; give another directory")
        config = CompileConfig(find_checkpoint(options.model), trust_remote_code=options.trust_remote_code)
        plan = make_plan(config, options.to, (HEAD,) if options.ignore is None else options.ignore)
        errors = measure(plan, progress) if options.measure else []
        num_bytes = write_quantized(plan, output, progress)
    except (CaptureError, LoadError, OSError) as error:
        raise ConfigError(str(error)) from error
    finally:
        progress.close()
    if errors:
        print(table(errors))
    print(f"{output}: {len(plan.layouts)} weights as {options.to}, {num_bytes / 1e6:.1f} MB of "
          f"{plan.num_bytes / 1e6:.1f}; plain: {', '.join(plan.ignored) or 'no linear'}")  # fmt: skip
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fuseline quantize", description=COMMANDS["quantize"], formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, hub id of a cached snapshot, or demo")
    targets = "; ".join(f"{name}: {text}" for name, text in TARGETS.items())
    parser.add_argument("--to", required=True, choices=tuple(TARGETS), help=targets)
    parser.add_argument("--output", metavar="DIR", help="a directory that is not there yet; default: MODEL-int4, ...")
    words = "linears that stay plain, by name or its last word; may be repeated; default: lm_head"
    parser.add_argument("--ignore", action="append", metavar="GLOB", help=words)
    words = "print the errors of weights and of outputs on a few texts, the worst layers first"
    parser.add_argument("--measure", action="store_true", help=words)
    parser.add_argument("--trust-remote-code", action="store_true", help="allow Python code of the checkpoint")
    return parser
