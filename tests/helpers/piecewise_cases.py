"""A step of prefill and decode for tests of piecewise graphs."""

from __future__ import annotations

from dataclasses import replace

import torch

from fuseline.compile.graph_inputs import StepInputs, make_step


def mixed_step(counts: list[int], lengths: list[int], groups: int = 1, width: int = 2) -> StepInputs:
    """The last counts[s] of lengths[s] tokens of each sequence, whose blocks are its own; the last row of each."""
    tables = torch.arange(1, 1 + len(counts) * width, dtype=torch.int32).reshape(1, len(counts), width)
    step = make_step(counts, lengths, tables.expand(groups, -1, -1).contiguous(), 16)
    return replace(step, token_ids=step.positions * 3 % 50 + 5)
