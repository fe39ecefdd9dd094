"""What recurrences share: ops that keep a state of fixed size for a sequence, dense as captured and over slots.

`NAME` computes one dense sequence, which begins in the zero state. `NAME_slots` computes the sequences of a step: each
goes on from the state in its slot, or from zero if this step has its first token, and leaves the new state there.
States lie as the kernels want them: columns in panels of 16.

Legend: S sequences, L slots, R rows and V columns of a state, P panels of 16 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.ops.library import Make

PANEL = 16
FLOAT = torch.float32
MOST_SEQUENCES = 16
"""Workloads of up to so many tokens are a token of each sequence, larger ones a prompt."""


def num_panels(columns: int) -> int:
    return -(-columns // PANEL)


def to_panels(x: Tensor) -> Tensor:
    """[..., R, V] -> [..., P, R, 16], the last panel filled with zeros."""
    padded = F.pad(x, (0, num_panels(x.shape[-1]) * PANEL - x.shape[-1]))
    return padded.unflatten(-1, (-1, PANEL)).transpose(-2, -3)


def from_panels(panels: Tensor, columns: int) -> Tensor:
    """[..., P, R, 16] -> [..., R, V]."""
    return panels.transpose(-2, -3).flatten(-2)[..., :columns]


Step = Callable[[slice, Tensor], Tensor]
"""Computes the tokens of a sequence: (tokens, state in the slots' layout) -> the new state."""


def over_slots(state: Tensor, slots: Tensor, seq_lens: Tensor, query_start: Tensor, step: Step) -> None:
    """Calls `step` for the sequences of a step, with the zero state for one that begins, and stores what it returns."""
    starts = query_start.tolist()
    for s, (slot, length) in enumerate(zip(slots.tolist(), seq_lens.tolist(), strict=True)):
        begin, end = starts[s], starts[s + 1]
        if begin < end:
            old = torch.zeros_like(state[slot]) if length == end - begin else state[slot]
            state[slot] = step(slice(begin, end), old)


def step_inputs(make: Make, slots: int = 5) -> tuple[Tensor, Tensor, Tensor, int]:
    """A sequence that begins, one that goes on, single tokens of either kind -> (slots, lengths, starts, tokens)."""
    counts, lengths = torch.tensor([7, 3, 1, 1]), torch.tensor([7, 12, 1, 9])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    return make.order(slots)[:4], lengths.int(), starts.int(), int(counts.sum())


def step_workloads(make: Make) -> Iterator[tuple[str, int, int, tuple[Tensor, Tensor, Tensor]]]:
    """Steps that go on with their sequences -> (label, tokens, slots, (slots, lengths, starts))."""
    for tokens in make.tokens:
        sequences = tokens if tokens <= MOST_SEQUENCES else 1
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=make.device) * (tokens // sequences)
        label = f"{sequences} x {tokens // sequences} tokens"
        yield label, tokens, sequences + 1, (make.order(sequences + 1)[:sequences], starts[1:] + 1, starts)
