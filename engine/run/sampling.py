"""One launch of the sampling kernels: a step's logits to its tokens, and how likely they and its prompt tokens were."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fuseline.compile.backends.device_inputs import Layout
from fuseline.engine.messages import PositionLogprobs
from fuseline.engine.run.device import Device, Results

INPUTS = (
    "temperature", "top_k", "top_p", "min_p", "repetition", "frequency", "presence", "seed", "counter", "num_logprobs",
    "history_start", "history", "prompt_len", "bias_start", "bias_ids", "bias_values", "banned_start", "banned_ids",
    "allowed_start", "allowed_ids",
)  # fmt: skip
"""Of the `sample` kernel, in its order."""


@dataclass
class SampleArguments:
    """What R rows want. Tensors are on the host."""

    num_rows: int
    num_top: int
    """Most log-probabilities that a row wants."""
    mode: int
    inputs: dict[str, Tensor]
    """By the names in INPUTS."""
    unknown: dict[str, Tensor] = field(default_factory=dict)
    """places, rows [K] int64: history[places] are tokens that the step before gave for these rows of its own and the
    host has not seen yet. Empty when it has seen all."""
    targets: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """[P] prompt tokens, whose logits come behind those of the R rows."""
    num_prompt_top: int = 0


@dataclass(frozen=True)
class RowScores:
    """Log-probabilities of R rows: of the token itself, its rank, and the best ones."""

    logprobs: Tensor  # [R] float32
    ranks: Tensor  # [R] int64
    top_ids: Tensor  # [R, L] int64
    top_logprobs: Tensor  # [R, L] float32

    @staticmethod
    def layout(prefix: str, num_rows: int, num_top: int) -> Layout:
        return {
            f"{prefix}logprobs": ((num_rows,), torch.float32),
            f"{prefix}ranks": ((num_rows,), torch.int64),
            f"{prefix}top_ids": ((num_rows, num_top), torch.int64),
            f"{prefix}top_logprobs": ((num_rows, num_top), torch.float32),
        }

    @staticmethod
    def among(tensors: dict[str, Tensor], prefix: str = "") -> RowScores:
        return RowScores(*(tensors[prefix + name] for name in ("logprobs", "ranks", "top_ids", "top_logprobs")))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
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
class StepResult:
    """Entry i of `sampled` belongs to the i-th sampling sequence of the plan; rows of `scores` to the targets."""

    sampled: Sampled | None
    scores: RowScores | None


@dataclass(frozen=True)
class Launched:
    """A step on its way."""

    arguments: SampleArguments
    results: Results

    @property
    def tokens(self) -> Tensor:
        """[R] int64 on the device, for what is launched next."""
        return self.results.tensors["tokens"]

    def result(self) -> StepResult:
        """Waits for the step."""
        found, arguments = self.results.read(), self.arguments
        sampled = scores = None
        if arguments.num_rows:
            sampled = Sampled(found["tokens"].numpy(), found["ok"].numpy() != 0, RowScores.among(found))
        if len(arguments.targets):
            scores = RowScores.among(found, "prompt_")
        return StepResult(sampled, scores)


def launch_sampling(device: Device, logits: Tensor, arguments: SampleArguments, before: Tensor | None) -> Launched:
    """logits [R + P, V] float32. `before`: the tokens of the step before, on the device, if some are unknown."""
    num_rows, num_targets = arguments.num_rows, len(arguments.targets)
    layout = {"tokens": ((num_rows,), torch.int64), "ok": ((num_rows,), torch.uint8)}
    layout |= RowScores.layout("", num_rows, arguments.num_top)
    if num_targets:
        layout |= RowScores.layout("prompt_", num_targets, arguments.num_prompt_top)
    # A row that is not ok leaves its token as it is: a zero.
    results = device.results(layout)
    out, given = results.tensors, device.upload({**arguments.inputs, **arguments.unknown, "targets": arguments.targets})
    if arguments.unknown:
        given["history"].index_copy_(0, given["places"], before.index_select(0, given["rows"]))
    if num_rows:
        device.ops.sample(
            out["tokens"], *RowScores.among(out).tensors, out["ok"], logits[:num_rows],
            *(given[name] for name in INPUTS), None, arguments.mode,
        )  # fmt: skip
    if num_targets:
        device.ops.row_logprobs(*RowScores.among(out, "prompt_").tensors, logits[num_rows:], given["targets"])
    results.send()
    return Launched(arguments, results)
