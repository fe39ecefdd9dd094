"""Computes a plan: builds the inputs, runs the model, samples."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from fuseline.compile.graph_inputs import BlockCopy, GraphInputs
from fuseline.compile.specs import ModelInfo
from fuseline.engine.memory.kv_manager import KVManager
from fuseline.engine.request import Sequence
from fuseline.engine.run.inputs import InputBuilder
from fuseline.engine.run.request_rows import RequestRows
from fuseline.engine.run.sampler import RowScores, SampleArguments, Sampled, SampleOps, Sampler
from fuseline.engine.schedule.plan import Plan


class Model(Protocol):
    """What the engine needs of a CompiledModel."""

    info: ModelInfo

    def allocate_caches(self, num_blocks: Seq[int]) -> None: ...

    def run(self, inputs: GraphInputs) -> torch.Tensor: ...


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


@dataclass(frozen=True)
class Batch:
    """A plan made ready. What depends on tokens of the step before is missing until `Runner.fill`."""

    plan: Plan
    builder: InputBuilder
    inputs: GraphInputs
    arguments: SampleArguments
    scoring: list[tuple[Sequence, range]]
    """Sequence and the positions whose prompt tokens are scored."""
    complete: list[Sequence]
    """Those that want no tokens and have the last of their prompt computed in this step."""
    departed: dict[int, Sequence] = field(default_factory=dict)
    """Sampling sequences that have left their row while the batch ran, by index."""


@dataclass(frozen=True)
class StepResult:
    """Entry i of `sampled` belongs to the i-th sampling sequence of the plan; `scores` rows follow `Batch.scoring`."""

    sampled: Sampled | None
    scores: RowScores | None


class Runner:
    """`prepare`, `fill`, `run`; the last may be called from another thread, beside a `prepare` of the next step."""

    def __init__(self, model: Model, ops: SampleOps, rows: RequestRows, kv: KVManager, max_num_tokens: int) -> None:
        self.model = model
        self.rows = rows
        switch = model.info.rope_switch
        # Two: the inputs of the next step are built while the last one still reads its own.
        self._builders = [InputBuilder(rows, kv, max_num_tokens, switch) for _ in range(2)]
        self.sampler = Sampler(rows, model.info.vocab_size, ops)

    def prepare(self, plan: Plan) -> Batch:
        self._builders.reverse()
        builder = self._builders[0]
        scoring, score_rows = _scored_rows(plan, self.rows)
        complete = [self.rows.sequences[row] for row in plan.rows[plan.complete].tolist()]
        inputs, arguments = builder.build(plan, score_rows), self.sampler.prepare(plan)
        return Batch(plan, builder, inputs, arguments, scoring, complete)

    def fill(self, batch: Batch) -> None:
        """All tokens of the sequences are known now."""
        batch.builder.fill_tokens()
        self.sampler.fill(batch.arguments)

    def run(self, batch: Batch) -> StepResult:
        if batch.plan.copies:
            self.model.swap(batch.plan.copies)
        logits = self.model.run(batch.inputs)
        num_sampling = len(batch.plan.sampling)
        sampled = self.sampler.sample(logits[:num_sampling], batch.arguments) if num_sampling else None
        scores = self._score(logits[num_sampling:], batch.scoring) if batch.scoring else None
        return StepResult(sampled, scores)

    def _score(self, logits: torch.Tensor, scoring: list[tuple[Sequence, range]]) -> RowScores:
        targets = [seq.stored[position] for seq, positions in scoring for position in positions]
        return self.sampler.score(logits, targets, max(seq.params.prompt_logprobs or 0 for seq, _ in scoring))


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
