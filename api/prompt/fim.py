"""Fill in the middle: the suffix of /v1/completions, for models whose tokenizer has the tokens for it (SPEC 4.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

FORMATS: tuple[tuple[str, str, str], ...] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("[PREFIX]", "[SUFFIX]", ""),
)
"""Tokens before the prefix, before the suffix and before the middle. Without the last, the suffix comes first."""


@dataclass(frozen=True)
class FimTokens:
    """Ids of a tokenizer's tokens for it; `middle` None: the text behind the prefix is what is filled in."""

    prefix: int
    suffix: int
    middle: int | None

    def prompt(self, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """Token ids of a prompt that the model answers with the text between."""
        if self.middle is None:
            return [self.suffix, *suffix, self.prefix, *prefix]
        return [self.prefix, *prefix, self.suffix, *suffix, self.middle]


def find_fim(token_id: Callable[[str], int | None]) -> FimTokens | None:
    """The tokens that a tokenizer has, None without. `token_id` looks up one token's text."""
    for names in FORMATS:
        ids = [token_id(name) if name else None for name in names]
        if all(found is not None for name, found in zip(names, ids, strict=True) if name):
            return FimTokens(*ids)
    return None
