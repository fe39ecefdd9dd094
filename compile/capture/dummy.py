"""Random weights, for runs without a checkpoint's values: the same for a name and a seed on every machine."""

from __future__ import annotations

import hashlib

import torch

from fuseline.compile.capture import pieces
from fuseline.compile.capture.captured import CapturedModel
from fuseline.compile.capture.pieces import Unread
from fuseline.compile.capture.reader import Reader

DEFAULT_STD = 0.02


class DummyWeights:
    """Normal matrices of the config's initializer_range, norms of ones, biases of zeros."""

    origin = "dummy weights"

    def __init__(self, captured: CapturedModel, seed: int) -> None:
        self._captured = captured
        self._seed = seed
        self._std = captured.facts.initializer_range or DEFAULT_STD

    def find(self, name: str) -> Unread | None:
        if name not in self._captured.parameters:
            return None
        shape, dtype = self._captured.parameters[name]
        if name.endswith("bias"):
            return pieces.computed(torch.zeros(shape, dtype=dtype))
        if len(shape) < 2:
            return pieces.computed(torch.ones(shape, dtype=dtype))
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return pieces.computed(torch.empty(shape, dtype=dtype).normal_(0.0, self._std, generator=generator))

    def check_tied(self, reader: Reader) -> None:
        """Nothing to check: one of the tied is made."""

    def remember(self) -> None:
        """Nothing to remember: nothing was looked for."""

    def origin_of(self, unread: Unread) -> str:
        return self.origin
