"""Random weights, for runs without a checkpoint's values: the same for a name and a seed on every CPU.

They are made where they come to lie: a GPU makes those of an 8B model in a second, a host in a minute, and its numbers
are others.
"""

from __future__ import annotations

import hashlib

import torch

from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.captured import CapturedModel
from fuseline.compile.capture.lazy_tensor import LazyTensor

DEFAULT_STD = 0.02


class DummyWeights:
    """Normal matrices of the config's initializer_range, norms of ones, biases of zeros."""

    origin = "dummy weights"

    def __init__(self, captured: CapturedModel, seed: int, device: torch.device) -> None:
        self._captured = captured
        self._seed, self._device = seed, device
        self._std = captured.facts.initializer_range or DEFAULT_STD

    def find(self, name: str) -> LazyTensor | None:
        if name not in self._captured.parameters:
            return None
        shape, dtype = self._captured.parameters[name]
        if name.endswith("bias"):
            return lazy_tensor.computed(torch.zeros(shape, dtype=dtype, device=self._device))
        if len(shape) < 2:
            return lazy_tensor.computed(torch.ones(shape, dtype=dtype, device=self._device))
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        made = torch.empty(shape, dtype=dtype, device=self._device)
        return lazy_tensor.computed(made.normal_(0.0, self._std, generator=generator))

    def remember(self) -> None:
        """Do nothing: dummy weights have no weight map to save."""
