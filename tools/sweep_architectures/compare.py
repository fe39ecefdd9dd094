"""Logits of ours against those of Transformers: what counts as equal, and why so much and no more.

float32: each row of logits must be Transformers', to check.MAX_ERROR of its spread or to what rounding alone explains
(check.allowed_error). A greedy token that differs is a fault unless the two highest logits are that near.

bfloat16: what rounding explains is measured in the same model: the distance of Transformers' own logits in bfloat16
from those in float32. Ours may be as far from the latter: their median over the rows MORE_ROUNDING times as far, and
greedy tokens differ only where the float32 logits are nearer than MORE_ROUNDING times the largest distance of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fuseline.compile.check import row_errors

MORE_ROUNDING = 2.0
"""Kernels round in other places than torch, so that one of both may be this much farther off."""
FLOOR = 1e-3
"""Median error in bfloat16 that is always allowed: a quarter of the rounding of one number."""


class Difference(Exception):
    """What differs, in words."""


def check_float32(found: Sequence[Tensor], expected: Sequence[Tensor], allowed: Sequence[float]) -> str:
    """The largest error in words; logits [T, V] and allowed errors of each sequence. Raises Difference."""
    worst = 0.0
    for number, (ours, theirs, most) in enumerate(zip(found, expected, allowed, strict=True)):
        error = float(row_errors(ours, theirs).max())
        if not error <= most:
            raise Difference(f"float32: an error of {error:.2g} of the logits' spread, and rounding gives {most:.2g}")
        if lost := lost_token(theirs, ours.argmax(-1), 2 * most):  # the error of each of two logits
            raise Difference(f"float32: in sequence {number} {lost}")
        worst = max(worst, error)
    return f"float32 {worst:.0e}"


def check_bfloat16(found: Sequence[Tensor], halved: Sequence[Tensor], exact: Sequence[Tensor]) -> str:
    """Median errors in words; `halved`: Transformers' logits in bfloat16, `exact`: in float32. Raises Difference."""
    theirs, ours = (
        torch.cat([row_errors(*pair) for pair in zip(logits, exact, strict=True)]) for logits in (halved, found)
    )
    typical, ours_typical = float(theirs.median()), float(ours.median())
    medians = f"bfloat16 {ours_typical:.0e}, Transformers {typical:.0e}"
    if not ours_typical <= max(MORE_ROUNDING * typical, FLOOR):
        raise Difference(f"{medians}: the median error, relative to the logits' spread")
    allowed = 2 * MORE_ROUNDING * float(theirs.max())
    for number, (rows, right) in enumerate(zip(found, exact, strict=True)):
        if lost := lost_token(right, rows.argmax(-1), allowed):
            raise Difference(f"bfloat16: in sequence {number} {lost}, and rounding gives {allowed:.2g}")
    return medians


def lost_token(logits: Tensor, chosen: Tensor, allowed: float) -> str:
    """Describes the first of the chosen tokens [T] that is not greedy; empty if all are.

    A tie does not count: a logit within `allowed` of the highest, relative to the row's spread.
    """
    behind = (logits.amax(-1) - logits.gather(-1, chosen[:, None])[:, 0]) / logits.std(-1)
    far = (behind > allowed).nonzero().flatten().tolist()
    return f"token {far[0]} is not the highest, by {float(behind[far[0]]):.2g} of the logits' spread" if far else ""
