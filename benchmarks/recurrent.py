"""Models with recurrent states against Transformers: prompt and decode rates, and decode time by context.

    python benchmarks/recurrent.py mamba2-370m --contexts 128,1024,4096

Both run in this process, one after the other for each figure, in bfloat16; weights are random. A figure is the median
of `--repeats`. With one thread times are those of the processor, so that other load counts less.

    python benchmarks/recurrent.py granite-4.0-h-350m --prefix 1500

starts our server instead, and measures the time to the first token of prompts that share so many tokens, one after the
other: computed whole, found in the prefix cache, and the next turn of a conversation. Times of the server's processor
stand beside those of the clock.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from checkpoints import make_checkpoint, shapes
from compare import BIN, Server, free_port, running
from transformers import AutoModelForCausalLM

from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph_inputs import StepInputs, make_step
from fuseline.compile.target import detect_target

BLOCK_SIZE, CHUNK, DECODED = 16, 2048, 8
QUESTION, ANSWER = 32, 40
"""Tokens behind a shared prefix, and tokens of an answer."""


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


def first_token(process: psutil.Process, port: int, prompt: list[int]) -> tuple[tuple[float, float], list[int]]:
    """((seconds until the first token, the processor's of them), all tokens) of a greedy answer."""
    fields = {"prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=900)
    started, busy = time.perf_counter(), cpu_seconds(process)
    body = json.dumps(fields | {"return_token_ids": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    seconds, tokens = None, []
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            new = json.loads(line[6:])["choices"][0].get("token_ids") or []
            if new and seconds is None:
                seconds = time.perf_counter() - started, cpu_seconds(process) - busy
            tokens += new
    return seconds, tokens


def cpu_seconds(process: psutil.Process) -> float:
    """Of a server and its children."""
    return sum(sum(each.cpu_times()[:2]) for each in [process, *process.children(recursive=True)])


def prefix_times(
    process: psutil.Process, port: int, length: int, vocab_size: int, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds until the first token, and the processor's of them, for each of `repeats` prefixes."""
    rng = random.Random(0)

    def draw(count: int) -> list[int]:
        return [rng.randrange(300, vocab_size) for _ in range(count)]

    found: dict[str, list[tuple[float, float]]] = {}
    first_token(process, port, draw(QUESTION))
    for _ in range(repeats):
        prefix = draw(length)
        for name in ("computed", "the second", "found", "found"):
            prompt = prefix + draw(QUESTION)
            seconds, answer = first_token(process, port, prompt)
            found.setdefault(name, []).append(seconds)
        seconds, _ = first_token(process, port, prompt + answer + draw(QUESTION))
        found.setdefault("the next turn", []).append(seconds)
    return found


def measure_prefix(path: Path, options: argparse.Namespace) -> None:
    """Prints times to the first token, and how many times longer the computed prompts take."""
    port = free_port()
    command = [str(BIN / "fuseline"), "serve", str(path), "--port", str(port), "--max-model-len", "4096"]
    flags = ["--max-num-seqs", "8", "--skip-model-check", "--cpu-threads", str(options.cpu_threads)]
    with running(Server("fuseline", [*command, *flags]), port) as (process, _):
        times = prefix_times(process, port, options.prefix, shapes()[options.shape].vocab_size, options.repeats)
    medians = {name: [statistics.median(side) for side in zip(*each, strict=True)] for name, each in times.items()}
    for name, (wall, busy) in medians.items():
        shares = [whole / part for whole, part in zip(medians["computed"], (wall, busy), strict=True)]
        text = f"{name}: {1000 * wall:.0f} ms, 1/{shares[0]:.1f} of the computed"
        print(f"{text}; of the processor {1000 * busy:.0f} ms, 1/{shares[1]:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=shapes())
    parser.add_argument("--contexts", default="128,1024,4096")
    parser.add_argument("--prefix", type=int, default=0, help="tokens that prompts share: measure the prefix cache")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.cpu_threads)
    contexts = [int(value) for value in options.contexts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(options.shape, Path(folder) / "model")
        if options.prefix:
            return measure_prefix(path, options)
        sides = Ours(path, options.cpu_threads, max(contexts) + DECODED), Theirs(path)
        for length in contexts:
            for what, (ours, theirs) in rates(sides, length, options.repeats):
                print(f"{what} at {length}: {ours:.1f} and {theirs:.1f} tokens/s, {ours / theirs:.1f} x", flush=True)


if __name__ == "__main__":
    main()
