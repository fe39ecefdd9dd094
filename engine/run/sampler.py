"""From logits to tokens: fills the arguments of the `sample` and `row_logprobs` kernels and reads their answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fuseline.engine.messages import PositionLogprobs
from fuseline.engine.run.request_rows import RequestRows, banned_tokens
from fuseline.engine.schedule.plan import Plan


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

    logprobs: torch.Tensor  # [R] float32
    ranks: torch.Tensor  # [R] int64
    top_ids: torch.Tensor  # [R, L] int64
    top_logprobs: torch.Tensor  # [R, L] float32

    @staticmethod
    def make(num_rows: int, num_top: int) -> RowScores:
        return RowScores(
            torch.zeros(num_rows, dtype=torch.float32),
            torch.zeros(num_rows, dtype=torch.int64),
            torch.zeros((num_rows, num_top), dtype=torch.int64),
            torch.zeros((num_rows, num_top), dtype=torch.float32),
        )

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.logprobs, self.ranks, self.top_ids, self.top_logprobs

    def position(self, row: int, token: int, count: int) -> PositionLogprobs:
        return PositionLogprobs(
            token_id=token,
            logprob=float(self.logprobs[row]),
            rank=int(self.ranks[row]),
            top_ids=tuple(self.top_ids[row, :count].tolist()),
            top_logprobs=tuple(self.top_logprobs[row, :count].tolist()),
        )


@dataclass(frozen=True)
class Sampled:
    tokens: np.ndarray  # [R] int64
    ok: np.ndarray  # [R] bool; False: the row's logits were not finite
    scores: RowScores


@dataclass(frozen=True)
class RowSettings:
    """Arguments of the `sample` kernel that stay while the same R sequences sample."""

    rows: np.ndarray  # [R] int64
    tenancy: np.ndarray  # [R] int64
    num_top: int
    mode: int
    values: list[torch.Tensor]  # temperature ... seed, [R] each
    num_logprobs: torch.Tensor  # [R] int64
    prompt_len: torch.Tensor  # [R] int64
    has_history: np.ndarray  # [R] bool
    has_lists: bool
    no_items: tuple[torch.Tensor, torch.Tensor]
    """Starts and items of lists that are all empty."""
    no_scores: RowScores | None
    """Stands for outputs that the kernel leaves alone, since nobody wants log-probabilities."""


@dataclass
class SampleArguments:
    """Inputs of the `sample` kernel for R rows; those that depend on the newest tokens come last, by `Sampler.fill`."""

    settings: RowSettings
    lengths: np.ndarray  # [R] int64, tokens before the one to sample
    counter: torch.Tensor  # [R] int64
    history: tuple[torch.Tensor, torch.Tensor] = ()
    lists: list[torch.Tensor] = ()


class Sampler:
    def __init__(self, rows: RequestRows, vocab_size: int, ops: SampleOps) -> None:
        self.rows = rows
        self.vocab_size = vocab_size
        self.ops = ops
        self._settings: RowSettings | None = None

    def prepare(self, plan: Plan) -> SampleArguments:
        """What is known of the sampling sequences before their newest tokens are."""
        rows, tenancy, old = plan.rows[plan.sampling], plan.tenancy[plan.sampling], self._settings
        if old is None or not (np.array_equal(rows, old.rows) and np.array_equal(tenancy, old.tenancy)):
            self._settings = self._gather(rows, tenancy)
        counter = plan.lengths - self.rows.prompt_len[rows]
        return SampleArguments(self._settings, plan.lengths, torch.from_numpy(counter))

    def fill(self, arguments: SampleArguments) -> None:
        """The rest, from all tokens so far."""
        arguments.history = self._history(arguments)
        arguments.lists = self._lists(arguments.settings)

    def sample(self, logits: torch.Tensor, arguments: SampleArguments) -> Sampled:
        """logits [R, V] float32."""
        settings, num_rows = arguments.settings, len(arguments.lengths)
        scores = settings.no_scores or RowScores.make(num_rows, settings.num_top)
        # Zeros, because a row that is not ok leaves its token as it is.
        tokens = torch.zeros(num_rows, dtype=torch.int64)
        ok = torch.empty(num_rows, dtype=torch.uint8)
        self.ops.sample(
            tokens, *scores.tensors, ok, logits, *settings.values, arguments.counter, settings.num_logprobs,
            *arguments.history, settings.prompt_len, *arguments.lists, None, settings.mode,
        )  # fmt: skip
        return Sampled(tokens.numpy(), ok.numpy() != 0, scores)

    def score(self, logits: torch.Tensor, targets: list[int], num_top: int) -> RowScores:
        """Raw log-probabilities of given tokens. logits [R, V] float32."""
        scores = RowScores.make(len(targets), min(num_top, self.vocab_size))
        self.ops.row_logprobs(*scores.tensors, logits, torch.tensor(targets, dtype=torch.int64))
        return scores

    def _gather(self, rows: np.ndarray, tenancy: np.ndarray) -> RowSettings:
        state = self.rows
        modes = state.logprobs_mode[rows]
        if len(rows) and modes.min() != modes.max():
            raise ValueError("sequences of one server differ in logprobs_mode")
        num_logprobs = np.minimum(state.num_logprobs[rows], self.vocab_size)
        values = (state.temperature, state.top_k, state.top_p, state.min_p, state.repetition, state.frequency)
        return RowSettings(
            rows=rows,
            tenancy=tenancy,
            num_top=max(0, int(num_logprobs.max(initial=0))),
            mode=int(modes.max(initial=0)),
            values=[torch.from_numpy(array[rows]) for array in (*values, state.presence, state.seed)],
            num_logprobs=torch.from_numpy(num_logprobs),
            prompt_len=torch.from_numpy(state.prompt_len[rows]),
            has_history=state.has_history[rows],
            has_lists=bool(state.has_lists[rows].any()),
            no_items=_ragged([], len(rows)),
            no_scores=RowScores.make(len(rows), 0) if (num_logprobs < 0).all() else None,
        )

    def _history(self, arguments: SampleArguments) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of the rows with penalties, one after the other; other rows have none."""
        settings = arguments.settings
        if not settings.has_history.any():
            return settings.no_items
        lengths = np.where(settings.has_history, arguments.lengths, 0)
        parts = [self.rows.tokens[row, :length] for row, length in zip(settings.rows, lengths, strict=True)]
        return _ragged(parts, len(parts))

    def _lists(self, settings: RowSettings) -> list[torch.Tensor]:
        """bias_start, bias_ids, bias_values, banned_start, banned_ids, allowed_start, allowed_ids."""
        if not settings.has_lists:
            return [*settings.no_items, torch.empty(0), *settings.no_items, *settings.no_items]
        bias: list[list[int]] = []
        values: list[float] = []
        banned: list[list[int]] = []
        allowed: list[list[int]] = []
        for row in settings.rows.tolist():
            seq = self.rows.sequences[row]
            bias.append([token for token, _ in seq.params.logit_bias])
            values += [value for _, value in seq.params.logit_bias]
            banned.append([token for token in banned_tokens(seq) if 0 <= token < self.vocab_size])
            allowed.append(list(seq.params.allowed_token_ids))
        count = len(settings.rows)
        bias_values = torch.tensor(values, dtype=torch.float32)
        return [*_ragged(bias, count), bias_values, *_ragged(banned, count), *_ragged(allowed, count)]


def _ragged(parts: list, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row starts [count + 1] and the rows' items one after the other, int64. No parts: every row is empty."""
    starts = np.zeros(count + 1, np.int64)
    if not parts:
        return torch.from_numpy(starts), torch.empty(0, dtype=torch.int64)
    np.cumsum([len(part) for part in parts], out=starts[1:])
    return torch.from_numpy(starts), torch.from_numpy(np.concatenate(parts).astype(np.int64))
