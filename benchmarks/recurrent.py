"""Models with recurrent states against Transformers: prompt and decode rates, and decode time by context.

    python benchmarks/recurrent.py mamba2-370m --contexts 128,1024,4096

Both run in this process, one after the other for each figure, in bfloat16; weights are random. A figure is the median
of `--repeats`. With one thread times are those of the processor, so that other load counts less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from checkpoints import make_checkpoint, shapes
from transformers import AutoModelForCausalLM

from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph_inputs import StepInputs, make_step
from fuseline.compile.target import detect_target

BLOCK_SIZE, CHUNK, DECODED = 16, 2048, 8


class Ours:
    """One sequence, its prompt in chunks."""

    def __init__(self, path: Path, threads: int, longest: int) -> None:
        config = CompileConfig(str(path), level=3, skip_model_check=True, max_num_batched_tokens=CHUNK)
        self._model: CpuModel = compile_model(config, detect_target(threads))
        self._blocks = -(-longest // BLOCK_SIZE) + 1
        self._model.allocate_caches([self._blocks + 1] * len(self._model.info.cache_groups))
        self._model.allocate_states(1)

    def _step(self, count: int, length: int) -> StepInputs:
        table = torch.arange(1, self._blocks + 1)[None].expand(len(self._model.info.cache_groups), -1, -1)
        inputs = make_step([count], [length], table, BLOCK_SIZE)
        inputs.state_slots = torch.zeros(1, dtype=torch.int64)
        return inputs

    def prompt(self, length: int) -> None:
        for end in range(CHUNK, length + CHUNK, CHUNK):
            self._model.run(self._step(min(end, length) - end + CHUNK, min(end, length)))

    def decode(self, length: int) -> None:
        for k in range(DECODED):
            self._model.run(self._step(1, length + k + 1))


class Theirs:
    """The same with Transformers' own cache."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self._cache: object = None

    @torch.no_grad()
    def prompt(self, length: int) -> None:
        tokens = torch.zeros(1, length, dtype=torch.int64)
        found = self._model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        self._cache = getattr(found, "cache", None) or found.past_key_values

    @torch.no_grad()
    def decode(self, length: int) -> None:
        name = "cache" if "cache" in self._model.forward.__code__.co_varnames else "past_key_values"
        for _ in range(DECODED):
            self._model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True, **{name: self._cache})


def seconds(run: Callable[[], None]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    run()
    return clock() - started


def rates(sides: tuple[Ours, Theirs], length: int, repeats: int) -> Iterator[tuple[str, list[float]]]:
    """Tokens per second of both sides, alternately timed: prompt, then decode behind it."""
    prompt: list[list[float]] = [[], []]
    decode: list[list[float]] = [[], []]
    for _ in range(repeats):
        for side, of_prompt, of_decode in zip(sides, prompt, decode, strict=True):
            of_prompt.append(seconds(lambda s=side: s.prompt(length)))
            of_decode.append(seconds(lambda s=side: s.decode(length)))
    yield "prompt", [length / statistics.median(times) for times in prompt]
    yield "decode", [DECODED / statistics.median(times) for times in decode]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=shapes())
    parser.add_argument("--contexts", default="128,1024,4096")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.cpu_threads)
    contexts = [int(value) for value in options.contexts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(options.shape, Path(folder) / "model")
        sides = Ours(path, options.cpu_threads, max(contexts) + DECODED), Theirs(path)
        for length in contexts:
            for what, (ours, theirs) in rates(sides, length, options.repeats):
                print(f"{what} at {length}: {ours:.1f} and {theirs:.1f} tokens/s, {ours / theirs:.1f} x", flush=True)


if __name__ == "__main__":
    main()
