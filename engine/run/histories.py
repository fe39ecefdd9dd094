"""Tokens of sequences with penalties, kept on an asynchronous device: each is sent there once.

A row of the device's memory belongs to the sequence that has the row of the same number. Only tokens that it does not
hold yet go there: all of them for a sequence that comes into a row, then the newest, which the step before may have
left on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fuseline.engine.run.device import Device
from fuseline.engine.state.rows import RequestRows


@dataclass(frozen=True)
class History:
    """`memory` [N] int32 on the device, and what is written there before a step samples. Host tensors:
    known_places [K] int64, known_tokens [K] int32; unknown_places, unknown_rows [U] int64, of tokens that the step
    before gave for these rows of its own. A kind without any is left out.
    """

    memory: Tensor
    writes: dict[str, Tensor]

    def write(self, given: dict[str, Tensor], before: Tensor | None) -> Tensor:
        """The memory, up to date. `given`: the writes, on the device; `before` [rows]: tokens of the step before."""
        if "known_places" in given:
            self.memory.index_copy_(0, given["known_places"], given["known_tokens"])
        if "unknown_places" in given:
            tokens = before.index_select(0, given["unknown_rows"]).int()
            self.memory.index_copy_(0, given["unknown_places"], tokens)
        return self.memory


class Histories:
    def __init__(self, state: RequestRows, device: Device) -> None:
        """Takes `history_bytes` of the device, for as long as it lives."""
        self._state = state
        self._memory = history_memory(device, state.tokens.size)
        num_rows = len(state.sequences)
        self._generation = np.full(num_rows, -1)  # of what lies there, by row
        self._num_held = np.zeros(num_rows, np.int64)

    def extend(
        self, rows: np.ndarray, generation: np.ndarray, lengths: np.ndarray, sources: np.ndarray
    ) -> tuple[History, np.ndarray]:
        """For N positions of `rows`, in a step that samples what follows their `lengths` tokens -> (what to write,
        where each one's tokens begin [N]).

        Positions of a row follow each other, ascending; behind the first come drafts, which later steps write anew.
        sources [N]: row of the step before whose token is the last of these, or -1 if it is known.
        """
        held = np.where(self._generation[rows] == generation, self._num_held[rows], 0)
        self._generation[rows] = generation
        self._num_held[rows[::-1]] = lengths[::-1]
        starts = rows * self._state.tokens.shape[1]
        is_last = np.append(rows[1:] != rows[:-1], True)[: len(rows)]
        return self._writes(rows[is_last], held[is_last], lengths[is_last], sources[is_last]), starts

    def _writes(self, rows: np.ndarray, begins: np.ndarray, lengths: np.ndarray, sources: np.ndarray) -> History:
        """Write those of the first `lengths` tokens of each row that are missing: `begins` of them are there."""
        is_unknown = sources >= 0
        counts = lengths - is_unknown - begins
        starts = rows * self._state.tokens.shape[1]
        places = np.repeat(starts + begins - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        writes = {}
        if len(places):
            writes = {"known_places": places, "known_tokens": self._state.tokens.reshape(-1)[places]}
        if is_unknown.any():
            places = (starts + lengths - 1)[is_unknown]
            writes |= {"unknown_places": places, "unknown_rows": sources[is_unknown]}
        return History(self._memory, {name: torch.from_numpy(array) for name, array in writes.items()})


def history_memory(device: Device, num_tokens: int) -> Tensor:
    """[num_tokens] int32, zeros."""
    return device.results({"history": ((num_tokens,), torch.int32)}).tensors["history"]


def history_bytes(num_rows: int, max_model_len: int) -> int:
    return num_rows * (max_model_len + 1) * 4
