"""Log-probabilities of a prompt's tokens, gathered while it is computed."""

from __future__ import annotations

import numpy as np

from fuseline.engine.messages import PromptLogprobs

TYPES = (np.int64, np.float32, np.int64, np.int64, np.float32)
"""Of PromptLogprobs' arrays."""


class PromptScores:
    """Packed a chunk of the prompt at a time: a long one has millions of numbers."""

    def __init__(self, num_tokens: int, num_top: int) -> None:
        self._num_tokens, self.num_top = num_tokens, num_top
        self._chunks: list[tuple[int, tuple[bytes, ...]]] = []

    def add(self, begin: int, *arrays: np.ndarray) -> None:
        """Take the positions from `begin` on: token ids, log-probabilities, ranks [N], and the best tokens and
        log-probabilities [N, num_top]. What was known of them and of those behind is replaced: the prompt is computed
        anew.
        """
        while self._chunks and self._chunks[-1][0] >= begin:
            self._chunks.pop()
        self.num_top = min(self.num_top, arrays[3].shape[1])  # there may be fewer tokens in the vocabulary
        packed = (np.asarray(array, dtype).tobytes() for array, dtype in zip(arrays, TYPES, strict=True))
        self._chunks.append((begin, tuple(packed)))

    def message(self) -> PromptLogprobs:
        """What is known so far."""
        arrays = zip(*(chunk for _, chunk in self._chunks), strict=True)
        return PromptLogprobs(self._num_tokens, self.num_top, *map(b"".join, arrays))
