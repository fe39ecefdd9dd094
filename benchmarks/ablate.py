"""The effect of every pass and level: each is turned off in turn and timed against the model with all of them.

    python -P benchmarks/ablate.py 135m --prompt 256 --cpu-threads 2

Both models run alternately in this process, so that other load slows both; a ratio is the median over the rounds. Below
1.0: what was turned off helps. Each variant takes its loading time and `--seconds`, but at least one round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import NEEDED_PASSES, PASSES, CompileConfig
from fuseline.compile.graph_inputs import StepInputs, make_step
from fuseline.compile.target import detect_target

ALL_ON = 3
LEVELS = {"-O2": 2, "-O1": 1, "-O0": 0}
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Row:
    """Tokens per second of one variant, and its ratio to the full model, timed alternately with it."""

    name: str
    matches: int
    prefill: float
    prefill_ratio: float
    decode: float
    decode_ratio: float


def step_inputs(model: CpuModel, num_tokens: int, end: int) -> StepInputs:
    """One sequence of `end` tokens, of which the last `num_tokens` are computed."""
    groups, blocks = len(model.info.cache_groups), torch.arange(1, -(-end // BLOCK_SIZE) + 1)
    token_ids = (7919 * torch.arange(end - num_tokens, end) + 13) % model.info.vocab_size
    return make_step([num_tokens], [end], blocks.repeat(groups, 1, 1), BLOCK_SIZE, token_ids)


def in_turns(runs: list[Callable[[], object]], budget: float) -> list[list[float]]:
    """Seconds of each run in each round, for `budget` seconds; the first round is dropped if there are more."""
    times: list[list[float]] = [[] for _ in runs]
    deadline = time.perf_counter() + budget
    while not times[0] or time.perf_counter() < deadline:
        for run, found in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            found.append(time.perf_counter() - begin)
    return [found[1:] or found for found in times]


def compare(base: CpuModel, other: CpuModel, prompt: int, budget: float) -> list[tuple[float, float]]:
    """(Tokens per second of `other`, its ratio to `base`) for a prompt, then for decoding after it."""
    pairs = []
    for num_tokens, share in ((prompt, 0.5), (1, 0.5)):
        inputs = step_inputs(base, num_tokens, prompt + (num_tokens == 1))
        runs = [lambda model=model, inputs=inputs: model.run(inputs) for model in (base, other)]
        first, second = in_turns(runs, budget * share)
        ratio = statistics.median(a / b for a, b in zip(first, second, strict=True))
        pairs.append((num_tokens / statistics.median(second), ratio))
    return pairs


def measure(model: str, prompt: int, cpu_threads: int, budget: float, cache: str) -> Iterator[Row]:
    def build(level: int, *disabled: str) -> CpuModel:
        config = CompileConfig(
            model, level=level, disabled_passes=disabled, max_model_len=max(2048, prompt + BLOCK_SIZE),
            max_num_batched_tokens=max(prompt, 256), wait_compiled=True, cache_dir=cache,
        )  # fmt: skip
        made = compile_model(config, detect_target(cpu_threads))
        made.allocate_caches([-(-(prompt + 1) // BLOCK_SIZE) + 1] * len(made.info.cache_groups))
        return made

    matches = {report.name: report.matches for report in build(ALL_ON).report.reports}
    variants = {"all on": lambda: build(ALL_ON)}
    optional = [name for name in PASSES if name not in NEEDED_PASSES]
    variants |= {f"without {name}": lambda name=name: build(ALL_ON, name) for name in optional}
    variants |= {name: lambda level=level: build(level) for name, level in LEVELS.items()}
    for name, make in variants.items():
        # Both are built anew: against a model built long before, an identical one decoded up to 15 % slower.
        (prefill, prefill_ratio), (decode, decode_ratio) = compare(build(ALL_ON), make(), prompt, budget)
        yield Row(name, matches.get(name.removeprefix("without "), 0), prefill, prefill_ratio, decode, decode_ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt; decoding is timed behind it")
    parser.add_argument("--cpu-threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each variant")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    print("| variant | matches | prefill, token/s | ratio | decode, token/s | ratio |\n|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory(prefix="fuseline-ablate-") as cache:
        for row in measure(args.model, args.prompt, args.cpu_threads, args.seconds, cache):
            rows.append(asdict(row))
            speeds = f"{row.prefill:.1f} | {row.prefill_ratio:.3f} | {row.decode:.1f} | {row.decode_ratio:.3f}"
            print(f"| {row.name} | {row.matches or ''} | {speeds} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
