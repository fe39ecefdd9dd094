"""A fake drafter for tests of speculative decoding."""

from __future__ import annotations

import numpy as np
from fake_model import NAN_TOKEN, next_logits


class FakeDrafter:
    """Four drafts: what the fake model says is likeliest, wrong at every `wrong`-th length, by `token` if given."""

    num_tokens = 4

    def __init__(self, windows=(0,), threshold: int | None = None, wrong: int = 0, token: int | None = None) -> None:
        self.windows, self.threshold, self.wrong, self.token = windows, threshold, wrong, token

    def propose(self, tokens: np.ndarray) -> list[int]:
        known = tokens.tolist()
        for _ in range(self.num_tokens):
            guess = int(next_logits(known, self.windows, self.threshold).argmax())
            if self.wrong and len(known) % self.wrong == 0:
                guess = (guess + 1) % NAN_TOKEN if self.token is None else self.token
            known.append(guess)
        return known[len(tokens) :]
