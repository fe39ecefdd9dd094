"""Computes a plan: loads new rows, builds the inputs, runs the model, samples."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fuseline.compile.graph_inputs import GraphInputs
from fuseline.compile.specs import ModelInfo
from fuseline.engine.request import Sequence
from fuseline.engine.run.inputs import InputBuilder
from fuseline.engine.run.request_rows import RequestRows
from fuseline.engine.run.sampler import RowScores, Sampled, SampleOps, Sampler
from fuseline.engine.schedule.plan import Plan


class Model(Protocol):
    """What the engine needs of a CompiledModel."""

    info: ModelInfo

    def allocate_caches(self, num_blocks: Seq[int]) -> None: ...

    def run(self, inputs: GraphInputs) -> torch.Tensor: ...


@dataclass(frozen=True)
class StepResult:
    """Entry i of `sampled` belongs to `sampling[i]`; `scores` rows follow the sequences of `scoring`."""

    sampling: list[Sequence]
    sampled: Sampled | None
    scoring: list[tuple[Sequence, range]]
    """Sequence and the positions whose prompt tokens were scored."""
    scores: RowScores | None


class Runner:
    def __init__(
        self, model: Model, ops: SampleOps, max_num_seqs: int, max_num_tokens: int, max_model_len: int, block_size: int
    ) -> None:
        info = model.info
        self.model = model
        self.rows = RequestRows(max_num_seqs, max_model_len)
        num_groups = len(info.cache_groups)
        self.inputs = InputBuilder(self.rows, num_groups, block_size, max_num_tokens, info.rope_switch)
        self.sampler = Sampler(self.rows, info.vocab_size, ops)

    def execute(self, plan: Plan) -> StepResult:
        for seq in plan.started:
            self.rows.load(seq)
        sampling, scoring, logits_rows = _wanted_rows(plan)
        logits = self.model.run(self.inputs.build(plan, logits_rows))
        sampled = self._sample(logits[: len(sampling)], sampling) if sampling else None
        scores = self._score(logits[len(sampling) :], scoring) if scoring else None
        return StepResult(sampling, sampled, scoring, scores)

    def _sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> Sampled:
        sampled = self.sampler.sample(logits, sequences)
        rows = np.fromiter((s.row for s in sequences), np.int64, len(sequences))
        ends = np.fromiter((s.num_tokens for s in sequences), np.int64, len(sequences))
        self.rows.tokens[rows, ends] = sampled.tokens
        return sampled

    def _score(self, logits: torch.Tensor, scoring: list[tuple[Sequence, range]]) -> RowScores:
        targets = [seq.tokens[position] for seq, positions in scoring for position in positions]
        return self.sampler.score(logits, targets, max(seq.params.prompt_logprobs or 0 for seq, _ in scoring))


def _wanted_rows(plan: Plan) -> tuple[list[Sequence], list[tuple[Sequence, range]], np.ndarray]:
    """Who samples, who scores which prompt positions, and the rows of logits both read, the sampling ones first."""
    sampling: list[Sequence] = []
    sample_rows: list[int] = []
    scoring: list[tuple[Sequence, range]] = []
    score_rows: list[int] = []
    start = 0
    for seq, count in zip(plan.sequences, plan.counts, strict=True):
        end = seq.num_computed + count
        if end == seq.num_tokens and seq.params.max_tokens > 0:
            sampling.append(seq)
            sample_rows.append(start + count - 1)
        if seq.prompt_scores is not None:
            positions = range(seq.num_computed + 1, min(end + 1, seq.prompt_len))
            scoring.append((seq, positions))
            score_rows.extend(range(start, start + len(positions)))
        start += count
    return sampling, [s for s in scoring if len(s[1])], np.array(sample_rows + score_rows, np.int64)
