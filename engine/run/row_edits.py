"""Changes of single rows' logits before they are sampled: a request's own logits processors, and the temperature that
a beam search scores at. Also log-probabilities of tokens that a request names.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fuseline.engine.run.logits_processors import Processor

LOG = logging.getLogger("fuseline.engine")
BANNED = -1e30
"""Stands for minus infinity, which the kernels take for a fault of the model."""


@dataclass(frozen=True)
class RowEdit:
    """What is done to one of a step's rows. Token ids are those before the position that samples."""

    row: int
    temperature: float = 1.0
    processors: tuple[Processor, ...] = ()
    prompt: Seq[int] = ()
    generated: Seq[int] = ()
    wants_raw: bool = False
    """Its log-probabilities are those of the logits before the processors."""
    named: Seq[int] = ()
    """Tokens whose log-probabilities are wanted."""


@dataclass
class Edited:
    """What is to be done once the rows are sampled."""

    raw: dict[int, Tensor] = field(default_factory=dict)
    """[V] logits whose scores replace those of a row."""
    failed: list[int] = field(default_factory=list)
    """Rows of which a processor raised, or left nothing to choose from."""


def edit_rows(logits: Tensor, edits: Seq[RowEdit], named: Tensor | None) -> Edited:
    """Change logits [R, V] float32 in place. `named` [R, W] float32 takes the log-probabilities of named tokens."""
    edited = Edited()
    for edit in edits:
        row = logits[edit.row]
        if edit.temperature != 1.0:
            row /= edit.temperature
        if edit.named:
            ids = torch.tensor(edit.named, device=row.device)
            named[edit.row, : len(ids)] = torch.log_softmax(row, 0)[ids]
        if edit.processors and row.isfinite().all():  # else the kernel finds the model's fault
            if edit.wants_raw:
                edited.raw[edit.row] = row.clone()
            if not _process(row, edit):
                edited.failed.append(edit.row)
    return edited


def _process(row: Tensor, edit: RowEdit) -> bool:
    """Whether the processors left logits that can be sampled. They see a copy: a view must not outlive the step."""
    try:
        made = row.clone()
        for processor in edit.processors:
            made = processor(edit.prompt, edit.generated, made)
        made = torch.as_tensor(made, dtype=row.dtype, device=row.device)
        if made.shape != row.shape:
            raise ValueError(f"a row of logits has the shape {tuple(row.shape)}, not {tuple(made.shape)}")
        if made.isnan().any() or made.max() == -torch.inf:
            raise ValueError("no logits are left that can be sampled")
    except Exception:  # whatever a request's own code raises is that request's alone
        LOG.exception("a logits processor failed")
        return False
    row.copy_(torch.nan_to_num(made, neginf=BANNED, posinf=-BANNED))
    return True


def restore_scores(out: dict[str, Tensor], edited: Edited, is_logprob: bool) -> None:
    """Write the scores of the raw logits over those of the sampled ones. `out`: as RowScores.layout has them."""
    for row, raw in edited.raw.items():
        values = torch.log_softmax(raw, 0) if is_logprob else raw
        own = values[out["tokens"][row]]
        best, order = values.sort(descending=True, stable=True)
        count = out["top_ids"].shape[1]
        out["logprobs"][row], out["ranks"][row] = own, (values > own).sum() + 1
        out["top_ids"][row], out["top_logprobs"][row] = order[:count], best[:count]
