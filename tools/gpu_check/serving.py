"""Serving cost on top of the model: the engine with its scheduler, sampling and messages, all requests at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fuseline.compile.config import CompileConfig
from fuseline.engine.config import EngineConfig, SchedulerConfig
from fuseline.engine.engine import Engine
from fuseline.engine.messages import EngineRequest
from fuseline.engine.params import SamplingParams
from fuseline.engine.run.device import Device, Results
from gpu_check.llama import Runner
from gpu_check.table import Table


@dataclass(frozen=True)
class Batch:
    num_seqs: int = 256
    prompt: int = 128
    generated: int = 128
    max_tokens: int = 8192
    """Tokens per step."""


class Waits:
    """A device that records how long the host waits for it."""

    def __init__(self, device: Device) -> None:
        self.seconds = 0.0
        self._device = device

    def __getattr__(self, name: str) -> object:
        return getattr(self._device, name)

    def results(self, layout: object) -> Results:
        results = self._device.results(layout)
        results.read = self._timed(results.read)
        return results

    def _timed(self, read: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        def timed() -> dict[str, Tensor]:
            started = time.perf_counter()
            found = read()
            self.seconds += time.perf_counter() - started
            return found

        return timed


def measure_serving(runner: Runner, device: Device, batch: Batch, table: Table, of: str = "") -> None:
    """Offline throughput; for decode steps their time, the host's share, and the GPU's idle time between them.

    Names of rows begin with `of`.
    """
    waits = Waits(device)
    make_engine(runner, waits, batch, "warm").drain_all()
    engine = make_engine(runner, waits, batch, "timed")
    started = time.perf_counter()
    steps = engine.drain_all()
    seconds = time.perf_counter() - started
    rate = batch.num_seqs * batch.generated / seconds
    name = f"{of}engine, {batch.num_seqs} x {batch.prompt} in, {batch.generated} out"
    table.add(name, f"{rate:.0f} token/s", "", "18k token/s")
    decode = [step for step in steps if step.num_prompt_tokens == 0][1:-1]
    step = sum(s.seconds for s in decode) / len(decode)
    host = sum(s.seconds - s.waited for s in decode) / len(decode)
    busy, _ = runner.decode(batch.num_seqs, batch.prompt + batch.generated // 2, len(decode))
    table.add(f"{of}engine, a decode step", f"{step * 1e3:.2f} ms", f"host {host * 1e6:.0f} us")
    table.add(f"{of}engine, GPU idle between decode steps", f"{100 * max(0.0, 1 - busy / step):.1f} %", "", "3 %")


@dataclass(frozen=True)
class Step:
    seconds: float
    waited: float
    num_prompt_tokens: int


class TimedEngine:
    def __init__(self, engine: Engine, waits: Waits) -> None:
        self._engine, self._waits = engine, waits

    def drain_all(self) -> list[Step]:
        """Runs steps until nothing is left to do."""
        steps: list[Step] = []
        while self._engine.has_work:
            started, waited = time.perf_counter(), self._waits.seconds
            stats = self._engine.step().stats
            steps.append(
                Step(time.perf_counter() - started, self._waits.seconds - waited, stats.num_prompt_tokens)
            )  # fmt: skip
        return steps


def prompts_of(batch: Batch, vocab: int) -> list[tuple[int, ...]]:
    return [tuple((7 * k + i) % vocab for i in range(batch.prompt)) for k in range(batch.num_seqs)]


def make_engine(runner: Runner, waits: Waits, batch: Batch, name: str) -> TimedEngine:
    """An engine over the runner's caches, with all requests queued."""
    config = EngineConfig(
        CompileConfig(model=""), scheduler=SchedulerConfig(batch.max_tokens, batch.num_seqs), device="cuda"
    )
    engine = Engine(config, runner.model, [runner.num_blocks - 1], waits)
    params = SamplingParams(max_tokens=batch.generated, temperature=0.0)
    for k, prompt in enumerate(prompts_of(batch, runner.model.info.vocab_size)):
        engine.add(EngineRequest(request_id=f"{name}{k}", prompt_token_ids=prompt, params=params))
    return TimedEngine(engine, waits)
