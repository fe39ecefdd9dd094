"""Host time of a step: everything in the engine's process except the model and the sampling kernel.

    python -P benchmarks/host.py [--json FILE] [--running 1,16,64,256,512] [--vocab 49152]

The model is a fake that computes nothing. "host" is a step without the sampling kernel: schedule, inputs, sampling
arguments, update, endings, outputs, encoding and sending. "kernel" is greedy sampling by the native kernel over a real
vocabulary, measured within the same steps: it evicts the CPU caches. Host time should not depend on the number of
waiting requests or on the context.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch
import zmq

from fuseline.compile.config import CompileConfig
from fuseline.compile.graph_inputs import StepOutput
from fuseline.compile.specs import CacheGroup, CacheSpec, ModelInfo
from fuseline.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from fuseline.engine.engine import Engine
from fuseline.engine.messages import EngineRequest
from fuseline.engine.params import SamplingParams
from fuseline.engine.process import ANSWERS, open_socket
from fuseline.engine.run.device import HostDevice, SampleOps, native_ops

BLOCK_SIZE = 16
LONGEST = 131072
MAX_TOKENS = 4096
ENDS = (0, 2)


class NoModel:
    """A model that returns the same logits in every step."""

    def __init__(self, vocab_size: int, num_rows: int) -> None:
        self.info = ModelInfo(
            architecture="None", vocab_size=vocab_size, hidden_size=1, num_layers=1, max_model_len=LONGEST + MAX_TOKENS,
            dtype="float32", eos_token_ids=(0,), weight_bytes=0, arena_bytes=0, rope_switch=None,
            cache_specs=(CacheSpec(0, 1, 1, 1, "float32", 0),), cache_groups=(CacheGroup(0, (0,)),),
        )  # fmt: skip
        self.logits = torch.randn(num_rows, vocab_size)
        self.logits[:, list(ENDS)] = -100.0

    def allocate_caches(self, num_blocks) -> None:
        pass

    def run(self, inputs) -> StepOutput:
        return StepOutput(self.logits[: len(inputs.logits_rows)])


class TimedOps:
    """Sampling ops that record their time; without `native` every sampled token is 7."""

    def __init__(self, native: bool) -> None:
        self.seconds = 0.0
        kernel = native_ops().sample if native else _always_seven

        def sample(*arguments) -> None:
            start = time.perf_counter()
            kernel(*arguments)
            self.seconds += time.perf_counter() - start

        self.ops = SampleOps(sample, sample)


def _always_seven(tokens, logprobs, ranks, top_ids, top_logprobs, ok, *_) -> None:
    tokens.fill_(7)
    ok.fill_(1)


@dataclass(frozen=True)
class Case:
    running: int
    waiting: int
    context: int
    native: bool


@dataclass(frozen=True)
class Result:
    case: Case
    host_ms: float
    host_p90_ms: float
    kernel_ms: float
    num_bytes: int
    """Size of a step's message."""


def measure(case: Case, vocab_size: int, num_steps: int, asynchronous: bool) -> Result:
    ops = TimedOps(case.native)
    engine = _make_engine(case, vocab_size, ops, asynchronous)
    _fill(engine, case)
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        reader = open_socket(context, zmq.PULL, folder, ANSWERS, bind=True)
        writer = open_socket(context, zmq.PUSH, folder, ANSWERS)
        encoder = msgspec.msgpack.Encoder()
        host, kernel, num_bytes = [], [], 0
        for _ in range(num_steps):
            ops.seconds = 0.0
            start = time.perf_counter()
            message = encoder.encode(engine.step())
            writer.send(message)
            host.append(time.perf_counter() - start - ops.seconds)
            kernel.append(ops.seconds)
            num_bytes = len(message)
            reader.recv()
        reader.close(0)
        writer.close(0)
    host.sort()
    assert len(engine.scheduler.running) == case.running and len(engine.scheduler.waiting) == case.waiting
    middle, p90 = statistics.median(host), host[int(0.9 * len(host))]
    return Result(case, 1e3 * middle, 1e3 * p90, 1e3 * statistics.median(kernel), num_bytes)


def _make_engine(case: Case, vocab_size: int, ops: TimedOps, asynchronous: bool) -> Engine:
    model = NoModel(vocab_size, case.running)
    num_blocks = case.context // BLOCK_SIZE + case.running * (MAX_TOKENS // BLOCK_SIZE + 2)
    scheduler = {"max_num_batched_tokens": LONGEST + case.running, "max_num_seqs": case.running}
    if asynchronous:
        scheduler["async_scheduling"] = True
    config = EngineConfig(
        CompileConfig(model="none", max_model_len=LONGEST + MAX_TOKENS),
        CacheConfig(block_size=BLOCK_SIZE, num_gpu_blocks_override=num_blocks),
        SchedulerConfig(**scheduler),
    )
    return Engine(config, model, [num_blocks], HostDevice(ops.ops))


def _fill(engine: Engine, case: Case) -> None:
    """All running sequences share a prompt, so that a long context is cheap to prepare."""
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, eos_token_ids=ENDS)
    for number in range(case.running):
        # Different lengths, so that sequences cross block boundaries in different steps.
        prompt = (5,) * (case.context - BLOCK_SIZE + 1 + number % BLOCK_SIZE)
        engine.add(EngineRequest(request_id=f"{number:032x}", prompt_token_ids=prompt, params=params))
    while len(engine.scheduler.running) < case.running:
        engine.step()
    for number in range(case.waiting):
        engine.add(EngineRequest(request_id=f"w{number:031x}", prompt_token_ids=(6, 7) * 16, params=params))
    for _ in range(20):
        engine.step()
    gc.collect()
    gc.freeze()


def cases(running: list[int]) -> list[Case]:
    plain = [Case(count, 0, 1024, native) for count in running for native in (False, True)]
    most = 256 if 256 in running else max(running)
    waiting = [Case(most, count, 1024, False) for count in (100, 10_000)]
    return plain + waiting + [Case(most, 0, context, False) for context in (16_384, LONGEST)]


def table(results: list[Result]) -> str:
    rows = [f"{'running':>8} {'waiting':>8} {'context':>8} {'host ms':>8} {'p90':>8} {'kernel ms':>10} {'bytes':>8}"]
    for result in results:
        case = result.case
        kernel = f"{result.kernel_ms:10.3f}" if case.native else f"{'none':>10}"
        rows.append(
            f"{case.running:8d} {case.waiting:8d} {case.context:8d} {result.host_ms:8.3f} {result.host_p90_ms:8.3f} "
            f"{kernel} {result.num_bytes:8d}"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--running", default="1,16,64,256,512")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--async-scheduling", action="store_true", help="with the next step scheduled ahead")
    options = parser.parse_args()
    running = [int(count) for count in options.running.split(",")]
    results = [measure(case, options.vocab, options.steps, options.async_scheduling) for case in cases(running)]
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
