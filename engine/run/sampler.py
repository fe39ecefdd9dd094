"""From logits to tokens: fills the arguments of the `sample` and `row_logprobs` kernels and reads their answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fuseline.engine.messages import PositionLogprobs
from fuseline.engine.request import Sequence
from fuseline.engine.run.request_rows import RequestRows, banned_tokens


@dataclass(frozen=True)
class SampleOps:
    """The two ops of csrc/cpu/ops.def, arguments in schema order, outputs written in place."""

    sample: Callable[..., None]
    row_logprobs: Callable[..., None]


def native_ops() -> SampleOps:
    """The kernels of csrc/cpu/kernels/sampling.cpp."""
    import fuseline._C  # noqa: F401 (registers them with torch)

    return SampleOps(torch.ops.fuseline_cpu.sample, torch.ops.fuseline_cpu.row_logprobs)


@dataclass(frozen=True)
class RowScores:
    """Log-probabilities of R rows: of the token itself, its rank, and the best ones."""

    logprobs: list[float]  # [R]
    ranks: list[int]  # [R]
    top_ids: torch.Tensor  # [R, L] int64
    top_logprobs: torch.Tensor  # [R, L] float32

    def position(self, row: int, token: int, count: int) -> PositionLogprobs:
        return PositionLogprobs(
            token_id=token,
            logprob=self.logprobs[row],
            rank=self.ranks[row],
            top_ids=tuple(self.top_ids[row, :count].tolist()),
            top_logprobs=tuple(self.top_logprobs[row, :count].tolist()),
        )


@dataclass(frozen=True)
class Sampled:
    tokens: list[int]  # [R]
    ok: list[int]  # [R]; 0: the row's logits were not finite
    scores: RowScores


class Sampler:
    def __init__(self, rows: RequestRows, vocab_size: int, ops: SampleOps) -> None:
        self.rows = rows
        self.vocab_size = vocab_size
        self.ops = ops

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> Sampled:
        """logits [R, V] float32, row i for sequences[i]."""
        rows, num_rows = self.rows, len(sequences)
        index = np.fromiter((s.row for s in sequences), np.int64, num_rows)
        modes = rows.logprobs_mode[index]
        if num_rows and modes.min() != modes.max():
            raise ValueError("sequences of one server differ in logprobs_mode")
        num_logprobs = np.minimum(rows.num_logprobs[index], self.vocab_size)
        out = _Outputs(num_rows, max(0, int(num_logprobs.max(initial=0))))
        # Zeros, because a row that is not ok leaves its token as it is.
        tokens = torch.zeros(num_rows, dtype=torch.int64)
        ok = torch.empty(num_rows, dtype=torch.uint8)
        counter = np.fromiter((s.num_generated for s in sequences), np.int64, num_rows)
        per_row = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.repetition, rows.frequency)
        gathered = [torch.from_numpy(array[index]) for array in (*per_row, rows.presence, rows.seed)]
        self.ops.sample(
            tokens, *out.tensors, ok, logits, *gathered, torch.from_numpy(counter), torch.from_numpy(num_logprobs),
            *self._history(index, sequences), torch.from_numpy(rows.prompt_len[index]),
            *self._lists(index, sequences), None, int(modes[0]),
        )  # fmt: skip
        return Sampled(tokens.tolist(), ok.tolist(), out.scores())

    def score(self, logits: torch.Tensor, targets: list[int], num_top: int) -> RowScores:
        """Raw log-probabilities of given tokens. logits [R, V] float32."""
        out = _Outputs(len(targets), min(num_top, self.vocab_size))
        self.ops.row_logprobs(*out.tensors, logits, torch.tensor(targets, dtype=torch.int64))
        return out.scores()

    def _history(self, index: np.ndarray, sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of the rows with penalties, one after the other; other rows have none."""
        wanted = self.rows.has_history[index]
        if not wanted.any():
            return _ragged([], len(sequences))
        empty = np.empty(0, np.int32)
        parts = [
            self.rows.tokens[row, : seq.num_tokens] if has else empty
            for row, seq, has in zip(index, sequences, wanted, strict=True)
        ]
        return _ragged(parts, len(parts))

    def _lists(self, index: np.ndarray, sequences: list[Sequence]) -> list[torch.Tensor]:
        """bias_start, bias_ids, bias_values, banned_start, banned_ids, allowed_start, allowed_ids."""
        bias: list[list[int]] = []
        values: list[float] = []
        banned: list[list[int]] = []
        allowed: list[list[int]] = []
        if self.rows.has_lists[index].any():
            for seq in sequences:
                bias.append([token for token, _ in seq.params.logit_bias])
                values += [value for _, value in seq.params.logit_bias]
                banned.append([token for token in banned_tokens(seq) if 0 <= token < self.vocab_size])
                allowed.append(list(seq.params.allowed_token_ids))
        count = len(sequences)
        bias_values = torch.tensor(values, dtype=torch.float32)
        return [*_ragged(bias, count), bias_values, *_ragged(banned, count), *_ragged(allowed, count)]


class _Outputs:
    def __init__(self, num_rows: int, num_top: int) -> None:
        self.tensors = (
            torch.zeros(num_rows, dtype=torch.float32),
            torch.zeros(num_rows, dtype=torch.int64),
            torch.zeros((num_rows, num_top), dtype=torch.int64),
            torch.zeros((num_rows, num_top), dtype=torch.float32),
        )

    def scores(self) -> RowScores:
        logprobs, ranks, top_ids, top_logprobs = self.tensors
        return RowScores(logprobs.tolist(), ranks.tolist(), top_ids, top_logprobs)


def _ragged(parts: list, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row starts [count + 1] and the rows' items one after the other, int64. No parts: every row is empty."""
    starts = np.zeros(count + 1, np.int64)
    if not parts:
        return torch.from_numpy(starts), torch.empty(0, dtype=torch.int64)
    np.cumsum([len(part) for part in parts], out=starts[1:])
    return torch.from_numpy(starts), torch.from_numpy(np.concatenate(parts).astype(np.int64))
