"""Computes a scheduled batch: builds the inputs, launches the model, and sampling or pooling."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from collections.abc import Set
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from fuseline.compile.graph_inputs import BlockCopy, StepInputs, StepOutput
from fuseline.compile.specs import ModelInfo
from fuseline.engine.config import EngineConfig
from fuseline.engine.memory.kv_manager import KVManager
from fuseline.engine.messages import StepTimes
from fuseline.engine.run.device import Device
from fuseline.engine.run.histories import Histories
from fuseline.engine.run.inputs import InputBuilder
from fuseline.engine.run.pooler import PoolArguments, Pooler
from fuseline.engine.run.sampler import Sampler
from fuseline.engine.run.sampling import Launched, SampleArguments, launch_sampling
from fuseline.engine.run.speculate.drafting import drafts_of
from fuseline.engine.state.rows import RequestRows
from fuseline.engine.state.scheduled_batch import ScheduledBatch
from fuseline.engine.state.sequence import Sequence


class Model(Protocol):
    """The part of a compiled model (CpuModel, CudaModel) that the engine uses."""

    info: ModelInfo

    def allocate_caches(self, num_blocks: Seq[int]) -> None: ...

    def run(self, inputs: StepInputs) -> StepOutput: ...


@runtime_checkable
class SwappingModel(Model, Protocol):
    """A model that can copy blocks of its caches to host memory and back."""

    def allocate_host_blocks(self, num_blocks: Seq[int]) -> None:
        """Blocks per cache group."""

    def swap(self, copies: Seq[BlockCopy]) -> None:
        """Copies blocks in this order, before what is run next. Never waits for the device."""


@runtime_checkable
class ForkingModel(Model, Protocol):
    """A model that can copy blocks within its caches."""

    def copy_blocks(self, pairs: Seq[np.ndarray]) -> None:
        """[2, F] int64 by cache group: blocks, and those that become copies of them before what is run next."""


@runtime_checkable
class StatefulModel(Model, Protocol):
    """A model with recurrent states."""

    def allocate_states(self, num_slots: int) -> None: ...

    def copy_states(self, pairs: np.ndarray) -> None:
        """[2, F] int64: slots, and those that become copies of them before what is run next. A slot that is read may be
        written too: all are read first.
        """


@runtime_checkable
class SleepingModel(Model, Protocol):
    """A model whose weights can leave its device."""

    def move_weights_to_host(self) -> None: ...

    def move_weights_back(self) -> None: ...

    def discard_weights(self) -> None:
        """For good."""


@dataclass
class PreparedBatch:
    """A scheduled batch made ready. Whatever depends on tokens of the step before is missing until `Runner.fill`."""

    scheduled: ScheduledBatch
    builder: InputBuilder
    inputs: StepInputs
    arguments: SampleArguments
    pooling: PoolArguments | None
    scoring: list[tuple[Sequence, range]]
    """Sequence and the positions whose prompt tokens are scored."""
    complete: list[Sequence]
    """Sequences that want no tokens and have the last of their prompt computed in this step."""
    drafts: np.ndarray | None
    """[N], as `drafts_of` gives them; None without drafts."""
    reads_tokens: bool
    """The host must know the tokens of the step before to launch this one."""
    kept: np.ndarray | None = None
    """[N] bool, positions whose token is kept, once drafts are verified; None: all."""
    times: StepTimes | None = None
    """What it took, once it has run, if steps are timed."""
    evicted: dict[int, Sequence] = field(default_factory=dict)
    """Sampling sequences that have lost their row while the batch ran, by position."""


class Runner:
    """`prepare`, `fill`, `run`; the last may be called from another thread, beside a `prepare` of the next step."""

    def __init__(
        self, model: Model, device: Device, rows: RequestRows, kv: KVManager, max_num_tokens: int, config: EngineConfig
    ) -> None:
        self.model = model
        self.device = device
        self.rows = rows
        switch = model.info.rope_switch
        # Two: the inputs of the next step are built while the last one still reads its own.
        self._builders = [InputBuilder(rows, kv, max_num_tokens, switch) for _ in range(2)]
        histories = Histories(rows, device) if device.is_asynchronous else None
        self.sampler = Sampler(rows, model.info.vocab_size, config.logprobs_mode, histories)
        self._traced = config.traced
        self.pooler = Pooler(rows, device, model.info.hidden_dim)
        self._sampling_rows = np.zeros(0, np.int64)  # of the step filled last
        self._sampled: torch.Tensor | None = None  # tokens of the step launched last, on the device

    def prepare(self, batch: ScheduledBatch) -> PreparedBatch:
        self._builders.reverse()
        builder, rows = self._builders[0], batch.rows[batch.sampling]
        scoring, score_rows = _scored_rows(batch, self.rows)
        pooling = self.pooler.prepare(batch)
        more_rows = score_rows if pooling is None else np.concatenate((score_rows, pooling.rows))
        inputs, arguments = builder.build(batch, more_rows), self.sampler.prepare(batch)
        if scoring:
            targets = [seq.stored[position] for seq, positions in scoring for position in positions]
            arguments.targets = torch.tensor(targets, dtype=torch.int64)
            most = max(seq.params.prompt_logprobs or 0 for seq, _ in scoring)
            arguments.num_prompt_top = min(most, self.model.info.vocab_size)
        is_reader = self.rows.reads_tokens[rows] if self.rows.reads_tokens.any() else None
        return PreparedBatch(
            scheduled=batch,
            builder=builder,
            inputs=inputs,
            arguments=arguments,
            pooling=pooling,
            scoring=scoring,
            complete=[self.rows.sequences[row] for row in batch.rows[batch.complete].tolist()],
            drafts=None if batch.num_drafts is None else drafts_of(batch, self.rows),
            reads_tokens=is_reader is not None and bool((is_reader & self._is_unknown(batch)).any()),
        )

    def fill(self, prepared: PreparedBatch) -> None:
        """Put in the tokens that are known, and where the rest will come from. Batches are filled in their order."""
        batch, sources = prepared.scheduled, None
        rows, is_unknown = batch.rows[batch.sampling], self._is_unknown(batch)
        prepared.builder.fill_tokens()
        if is_unknown.any():
            sampled_at = np.zeros(len(self.rows.sequences), np.int64)
            sampled_at[self._sampling_rows] = np.arange(len(self._sampling_rows))
            prepared.inputs.sources = prepared.builder.sources(batch, sampled_at)
            sources = np.where(is_unknown, sampled_at[rows], -1)
        self.sampler.fill(batch, prepared.arguments, sources)
        self._sampling_rows = rows

    def _is_unknown(self, batch: ScheduledBatch) -> np.ndarray:
        """[N] bool: positions whose token, computed in this step, still comes from the last one."""
        num_known = self.rows.num_known[batch.rows[batch.sampling]]
        if batch.num_drafts is not None:
            num_known += batch.num_drafts[batch.sampling]
        return num_known < batch.lengths

    def run(self, prepared: PreparedBatch) -> Launched:
        clock = _StepClock(self.device, self._traced)
        if prepared.scheduled.forks:
            self.model.copy_blocks(prepared.scheduled.forks)
        if prepared.scheduled.state_copies is not None:
            self.model.copy_states(prepared.scheduled.state_copies)
        if prepared.scheduled.copies:
            self.model.swap(prepared.scheduled.copies)
        prepared.inputs.sampled = self._sampled
        output, pooled = self.model.run(prepared.inputs), None
        forward = clock.read()
        if prepared.pooling:
            num_others = prepared.arguments.num_rows + len(prepared.arguments.targets)
            pooled = self.pooler.launch(output.hidden[num_others:], prepared.pooling)
        launched = launch_sampling(self.device, output.logits, prepared.arguments, self._sampled, pooled)
        self._sampled = launched.tokens
        prepared.times = clock.times(forward)
        return launched


class _StepClock:
    """Seconds since the begin of a step. A device that is only told what to do is waited for."""

    def __init__(self, device: Device, traced: Set[str]) -> None:
        self._device, self._traced = device, traced
        self._begin = perf_counter()

    def read(self) -> float:
        """0 where nothing is timed, without any wait."""
        if not self._traced:
            return 0.0
        self._device.synchronize()
        return perf_counter() - self._begin

    def times(self, forward: float) -> StepTimes | None:
        """At the end of a step whose forward pass has taken `forward` seconds."""
        if not self._traced:
            return None
        execute = self.read() if "worker" in self._traced else None
        return StepTimes(forward if "model" in self._traced else None, execute)


def _scored_rows(batch: ScheduledBatch, state: RequestRows) -> tuple[list[tuple[Sequence, range]], np.ndarray]:
    """Prompt positions that each sequence scores, and the tokens of the step whose logits do it."""
    scoring: list[tuple[Sequence, range]] = []
    score_rows: list[int] = []
    if state.wants_scores.any() and state.wants_scores[batch.rows].any():
        start = 0
        counts = zip(batch.rows.tolist(), batch.num_computed.tolist(), batch.num_new.tolist(), strict=True)
        for row, computed, count in counts:
            seq = state.sequences[row]
            positions = range(computed + 1, min(computed + count + 1, seq.prompt_len))
            if seq.prompt_scores is not None and len(positions):
                scoring.append((seq, positions))
                score_rows.extend(range(start, start + len(positions)))
            start += count
    return scoring, np.array(score_rows, np.int64)
