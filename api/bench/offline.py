"""`fuseline bench offline`: prompt processing and generation speed of an engine in this process, without HTTP.

    fuseline bench offline MODEL --input-lens 256,2048 --output-len 64 --batches 1,16
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from fuseline.api import cli_tables as tables
from fuseline.api.bench.files import save_json
from fuseline.api.cli_parser import command_parser, parse_values
from fuseline.api.config import ConfigError

MAX_REPEATS = 1000
OPTIONS = ("input_lens", "output_len", "batches", "repeats", "save_result")


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats, in tokens per second."""

    name: str
    batch: int
    input_len: int
    output_len: int
    tokens_per_second: float
    slowest: float
    fastest: float


def run_offline(arguments: Sequence[str]) -> int:
    """Entry of the subcommand; returns the exit status."""
    parser = command_parser("bench offline", tables.ENGINE_GROUPS)
    _add_options(parser)
    values = parse_values(parser, arguments)
    options = argparse.Namespace(**{name: values.pop(name) for name in OPTIONS})
    _check(options)
    results = measure(values, options)
    print(table(results))
    if options.save_result:
        save_json(options.save_result, {"model": values.get("model"), "speeds": [asdict(speed) for speed in results]})
    return 0


def measure(values: dict[str, object], options: argparse.Namespace) -> list[Speed]:
    """Start the engine and time every shape, prompts new each time so that no prefix is found."""
    from fuseline.api.llm import LLM
    from fuseline.engine.client import EngineStartError

    try:
        llm = LLM(**{"model": "demo", **values})
    except EngineStartError as error:
        raise ConfigError(str(error)) from error
    with llm:
        timer = _Timer(llm.generate, llm.ready.vocab_size, int(values.get("seed") or 0))
        timer.seconds(1, max(options.input_lens), 1)
        speeds = [_prefill(timer, length, options.repeats) for length in options.input_lens]
        length = options.input_lens[0]
        return speeds + [_decode(timer, batch, length, options) for batch in options.batches]


class _Timer:
    def __init__(self, generate: Callable[..., object], vocab_size: int, seed: int) -> None:
        self._generate = generate
        self._vocab_size = vocab_size
        self._random = random.Random(seed)

    def seconds(self, batch: int, input_len: int, output_len: int) -> float:
        prompts = [[self._random.randrange(self._vocab_size) for _ in range(input_len)] for _ in range(batch)]
        sampling = {"max_tokens": output_len, "temperature": 0.0, "ignore_eos": True}
        start = time.perf_counter()
        self._generate(prompts, sampling)
        return time.perf_counter() - start


def _prefill(timer: _Timer, length: int, repeats: int) -> Speed:
    rates = [length / timer.seconds(1, length, 1) for _ in range(repeats)]
    return _speed("prefill", 1, length, 1, rates)


def _decode(timer: _Timer, batch: int, length: int, options: argparse.Namespace) -> Speed:
    """One stream: what `output_len` tokens after the first take. More streams: everything, prompts included."""
    rates = []
    for _ in range(options.repeats):
        if batch > 1:
            rates.append(batch * options.output_len / timer.seconds(batch, length, options.output_len))
            continue
        rest = timer.seconds(1, length, options.output_len + 1) - timer.seconds(1, length, 1)
        rates.append(options.output_len / max(rest, 1e-9))
    return _speed("decode" if batch == 1 else "throughput", batch, length, options.output_len, rates)


def _speed(name: str, batch: int, input_len: int, output_len: int, rates: list[float]) -> Speed:
    return Speed(name, batch, input_len, output_len, statistics.median(rates), min(rates), max(rates))


def table(speeds: Sequence[Speed]) -> str:
    lines = [f"{'':<12}{'streams':>8}{'input':>8}{'output':>8}{'tokens/s':>12}{'slowest':>12}{'fastest':>12}"]
    for speed in speeds:
        shape = f"{speed.name:<12}{speed.batch:>8}{speed.input_len:>8}{speed.output_len:>8}"
        lines.append(f"{shape}{speed.tokens_per_second:>12.1f}{speed.slowest:>12.1f}{speed.fastest:>12.1f}")
    return "\n".join(lines)


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of counts such as 1,16")
    return counts


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("bench")
    group.add_argument("--input-lens", type=_counts, default=(256,), metavar="N,N", help="prompt lengths in tokens")
    group.add_argument("--output-len", type=int, default=64, help="tokens generated per request")
    group.add_argument("--batches", type=_counts, default=(1,), metavar="N,N", help="streams generated together")
    group.add_argument("--repeats", type=int, default=3, help="the median of so many is reported")
    group.add_argument("--save-result", default="", metavar="FILE", help="write the result as JSON")


def _check(options: argparse.Namespace) -> None:
    if not 1 <= options.repeats <= MAX_REPEATS:
        raise ConfigError(f"--repeats must be 1 to {MAX_REPEATS}")
    if options.output_len < 1:
        raise ConfigError("--output-len must be 1 or more")


