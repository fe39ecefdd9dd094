"""One launch of the sampling kernels: a step's logits to its tokens, and how likely they and its prompt tokens were."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from fuseline.compile.residency.uploads import Layout
from fuseline.engine.messages import PositionLogprobs
from fuseline.engine.params import SamplingParams
from fuseline.engine.run.device import Device, Results
from fuseline.engine.run.histories import History
from fuseline.engine.run.row_edits import RowEdit, edit_rows, restore_scores

INPUTS = (
    "temperature", "top_k", "top_p", "min_p", "repetition", "frequency", "presence", "seed", "counter", "num_logprobs",
    "history_start", "history", "prompt_len", "bias_start", "bias_ids", "bias_values", "banned_start", "banned_ids",
    "allowed_start", "allowed_ids",
)  # fmt: skip
"""Inputs of the `sample` kernel, in its order."""
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
"""In the order of their codes."""
RAW_MODES = (0, 2)
SCORES = ("logprobs", "ranks", "top_ids", "top_logprobs")
NOT_FINITE, OK, NOTHING_LEFT, PROCESSOR_FAILED = range(4)
"""Status of a sampled row: the model's logits are not finite; it has a token; the logits are finite, but bias, masks,
penalties and temperature leave no token; a logits processor of its request failed."""
NO_TARGETS = torch.empty(0, dtype=torch.int64)


def is_raw(mode: int) -> bool:
    """Whether log-probabilities are those of the model's own logits."""
    return mode in RAW_MODES


@dataclass
class SampleArguments:
    """Sampling settings of R rows. Tensors are on the host."""

    num_rows: int
    num_top: int
    """Most log-probabilities that a row wants."""
    mode: int
    """Index in LOGPROBS_MODES."""
    inputs: dict[str, Tensor]
    """By the names in INPUTS, and `bitmask` [R, ceil(V / 32)] int32 where a row has a grammar."""
    history: History | None = None
    """On the device, in place of the one among the inputs; history_start [2, R] is then where each row's begins and
    ends. None where nobody asks for it, and on devices that keep none."""
    no_scores: dict[str, Tensor] | None = None
    """None: a row wants log-probabilities. Else what stands for those outputs on the device, since the kernel leaves
    them alone: made by the first launch of the same rows, and kept."""
    edits: Seq[RowEdit] = ()
    """What is done to single rows beside."""
    targets: Tensor = NO_TARGETS
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
    status: np.ndarray  # [R] uint8: NOT_FINITE, OK, NOTHING_LEFT
    scores: RowScores | None  # None: nobody wants any
    named: Tensor | None = None  # [R, W] float32, log-probabilities of the tokens that rows name; None: no row does

    def position(self, row: int, params: SamplingParams) -> PositionLogprobs:
        """The scores that a row's sequence wants."""
        found = self.scores.position(row, int(self.tokens[row]), params.logprobs)
        if not params.logprob_token_ids:
            return found
        values = self.named[row, : len(params.logprob_token_ids)].tolist()
        return replace(found, top_ids=params.logprob_token_ids, top_logprobs=tuple(values))


@dataclass(frozen=True)
class StepResult:
    """Entry i of `sampled` belongs to the i-th sampling position of the batch, row i of `scores` to the i-th target,
    row i of `pooled` to the i-th pooling sequence that the step completes.
    """

    sampled: Sampled | None
    scores: RowScores | None
    pooled: np.ndarray | None = None  # [P, H] float32


@dataclass(frozen=True)
class Launched:
    """A step on its way."""

    arguments: SampleArguments
    results: Results
    failed: Seq[int] = ()
    """Rows whose logits processors failed."""

    @property
    def tokens(self) -> Tensor:
        """[R] int64 on the device, for what is launched next."""
        return self.results.tensors["tokens"]

    def result(self) -> StepResult:
        """Waits for the step."""
        found, arguments = self.results.read(), self.arguments
        sampled = scores = None
        if arguments.num_rows:
            scores_of_tokens = RowScores(*itemgetter(*SCORES)(found)) if arguments.no_scores is None else None
            status = found["ok"].numpy()
            if self.failed:
                status[list(self.failed)] = PROCESSOR_FAILED
            sampled = Sampled(found["tokens"].numpy(), status, scores_of_tokens, found.get("named"))
        if len(arguments.targets):
            scores = RowScores(*(found[f"prompt_{name}"] for name in SCORES))
        return StepResult(sampled, scores, found["pooled"].numpy() if "pooled" in found else None)


def launch_sampling(
    device: Device, logits: Tensor, arguments: SampleArguments, before: Tensor | None, pooled: Tensor | None = None
) -> Launched:
    """logits [R + P, V], float32 or what the device's kernels take; more rows are left alone.

    `before`: tokens of the step before, on the device, if some are unknown. `pooled`: vectors for the host.
    """
    num_rows, num_targets = arguments.num_rows, len(arguments.targets)
    layout = {"tokens": ((num_rows,), torch.int64), "ok": ((num_rows,), torch.uint8)}
    if arguments.no_scores is None:
        layout |= RowScores.layout("", num_rows, arguments.num_top)
    if num_targets:
        layout |= RowScores.layout("prompt_", num_targets, arguments.num_prompt_top)
    if pooled is not None:
        layout["pooled"] = (tuple(pooled.shape), torch.float32)
    if num_named := max((len(edit.named) for edit in arguments.edits), default=0):
        layout["named"] = ((num_rows, num_named), torch.float32)
    # A row that is not ok leaves its token as it is: a zero.
    results = device.results(layout)
    history = arguments.history
    writes = history.writes if history else {}
    out, given = results.tensors, device.upload({**arguments.inputs, **writes, "targets": arguments.targets})
    if history:
        given["history"] = history.write(given, before)
    chosen, edited = logits[:num_rows], None
    if arguments.edits:
        chosen = chosen.float()
        edited = edit_rows(chosen, arguments.edits, out.get("named"))
    if num_rows:
        scores = _score_outputs(device, out, arguments)
        device.ops.sample(
            out["tokens"], *itemgetter(*SCORES)(scores), out["ok"], chosen, *itemgetter(*INPUTS)(given),
            given.get("bitmask"), arguments.mode,
        )  # fmt: skip
    if edited:
        restore_scores(out, edited, arguments.mode == 0)
    if num_targets:
        scores = [out[f"prompt_{name}"] for name in SCORES]
        device.ops.row_logprobs(*scores, logits[num_rows : num_rows + num_targets], given["targets"])
    if pooled is not None:
        out["pooled"].copy_(pooled)
    results.send()
    return Launched(arguments, results, edited.failed if edited else ())


def _score_outputs(device: Device, out: dict[str, Tensor], arguments: SampleArguments) -> dict[str, Tensor]:
    if arguments.no_scores is None:
        return out
    if not arguments.no_scores:
        arguments.no_scores |= device.results(RowScores.layout("", arguments.num_rows, 0)).tensors
    return arguments.no_scores
