"""Computes a plan: builds the inputs, launches the model and sampling."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from fuseline.compile.graph_inputs import BlockCopy, StepInputs, StepOutput
from fuseline.compile.specs import ModelInfo
from fuseline.engine.memory.kv_manager import KVManager
from fuseline.engine.request import Sequence
from fuseline.engine.run.device import Device
from fuseline.engine.run.histories import Histories
from fuseline.engine.run.inputs import InputBuilder
from fuseline.engine.run.request_rows import RequestRows
from fuseline.engine.run.sampler import Sampler
from fuseline.engine.run.sampling import Launched, SampleArguments, launch_sampling
from fuseline.engine.schedule.plan import Plan


class Model(Protocol):
    """What the engine needs of a CompiledModel."""

    info: ModelInfo

    def allocate_caches(self, num_blocks: Seq[int]) -> None: ...

    def run(self, inputs: StepInputs) -> StepOutput: ...


@runtime_checkable
class SwappingModel(Model, Protocol):
    """One that can copy blocks of its caches to host memory and back."""

    def allocate_host_blocks(self, num_blocks: Seq[int]) -> None:
        """Blocks per cache group."""

    def swap(self, copies: Seq[BlockCopy]) -> None:
        """Copies blocks in this order, before what is run next. Never waits for the device."""


@runtime_checkable
class SleepingModel(Model, Protocol):
    """One whose weights can leave its device."""

    def move_weights_to_host(self) -> None: ...

    def move_weights_back(self) -> None: ...

    def discard_weights(self) -> None:
        """For good."""


@dataclass
class Batch:
    """A plan made ready. What depends on tokens of the step before is missing until `Runner.fill`."""

    plan: Plan
    builder: InputBuilder
    inputs: StepInputs
    arguments: SampleArguments
    scoring: list[tuple[Sequence, range]]
    """Sequence and the positions whose prompt tokens are scored."""
    complete: list[Sequence]
    """Those that want no tokens and have the last of their prompt computed in this step."""
    reads_tokens: bool
    """The host must know the tokens of the step before to launch this one."""
    departed: dict[int, Sequence] = field(default_factory=dict)
    """Sampling sequences that have left their row while the batch ran, by index."""


class Runner:
    """`prepare`, `fill`, `run`; the last may be called from another thread, beside a `prepare` of the next step."""

    def __init__(
        self, model: Model, device: Device, rows: RequestRows, kv: KVManager, max_num_tokens: int, logprobs_mode: str
    ) -> None:
        self.model = model
        self.device = device
        self.rows = rows
        switch = model.info.rope_switch
        # Two: the inputs of the next step are built while the last one still reads its own.
        self._builders = [InputBuilder(rows, kv, max_num_tokens, switch) for _ in range(2)]
        histories = Histories(rows, device) if device.is_queue else None
        self.sampler = Sampler(rows, model.info.vocab_size, logprobs_mode, histories)
        self._sampling_rows = np.zeros(0, np.int64)  # of the step filled last
        self._sampled: torch.Tensor | None = None  # tokens of the step launched last, on the device

    def prepare(self, plan: Plan) -> Batch:
        self._builders.reverse()
        builder, rows = self._builders[0], plan.rows[plan.sampling]
        scoring, score_rows = _scored_rows(plan, self.rows)
        complete = [self.rows.sequences[row] for row in plan.rows[plan.complete].tolist()]
        inputs, arguments = builder.build(plan, score_rows), self.sampler.prepare(plan)
        if scoring:
            targets = [seq.stored[position] for seq, positions in scoring for position in positions]
            arguments.targets = torch.tensor(targets, dtype=torch.int64)
            most = max(seq.params.prompt_logprobs or 0 for seq, _ in scoring)
            arguments.num_prompt_top = min(most, self.model.info.vocab_size)
        is_reader = self.rows.reads_tokens[rows]
        reads_tokens = bool(is_reader.any() and (is_reader & self._is_unknown(plan)).any())
        return Batch(plan, builder, inputs, arguments, scoring, complete, reads_tokens)

    def fill(self, batch: Batch) -> None:
        """What is known of the tokens, and where the rest will come from; the next batch is filled after this one."""
        plan, sources = batch.plan, None
        rows, is_unknown = plan.rows[plan.sampling], self._is_unknown(plan)
        batch.builder.fill_tokens()
        if is_unknown.any():
            sampled_at = np.zeros(len(self.rows.sequences), np.int64)
            sampled_at[self._sampling_rows] = np.arange(len(self._sampling_rows))
            batch.inputs.sources = batch.builder.sources(sampled_at)
            sources = np.where(is_unknown, sampled_at[rows], -1)
        self.sampler.fill(plan, batch.arguments, sources)
        self._sampling_rows = rows

    def _is_unknown(self, plan: Plan) -> np.ndarray:
        """[N] bool: sampling sequences whose newest token, computed in this step, still comes from the last one."""
        return self.rows.num_known[plan.rows[plan.sampling]] < plan.lengths

    def run(self, batch: Batch) -> Launched:
        if batch.plan.copies:
            self.model.swap(batch.plan.copies)
        batch.inputs.sampled = self._sampled
        logits = self.model.run(batch.inputs).logits
        launched = launch_sampling(self.device, logits, batch.arguments, self._sampled)
        self._sampled = launched.tokens
        return launched


def _scored_rows(plan: Plan, state: RequestRows) -> tuple[list[tuple[Sequence, range]], np.ndarray]:
    """Who scores which prompt positions, and the tokens of the step whose logits do it."""
    scoring: list[tuple[Sequence, range]] = []
    score_rows: list[int] = []
    if state.wants_scores[plan.rows].any():
        start = 0
        counts = zip(plan.rows.tolist(), plan.num_computed.tolist(), plan.counts.tolist(), strict=True)
        for row, computed, count in counts:
            seq = state.sequences[row]
            positions = range(computed + 1, min(computed + count + 1, seq.prompt_len))
            if seq.prompt_scores is not None and len(positions):
                scoring.append((seq, positions))
                score_rows.extend(range(start, start + len(positions)))
            start += count
    return scoring, np.array(score_rows, np.int64)
