"""How an op of the vocabulary is declared: one decorator registers reference and fake as torch.ops.fuseline.<name>."""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("fuseline", "DEF")


def op(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Registers the decorated reference under `schema`; `fake` gives the outputs' shapes."""
    name = schema.split("(", 1)[0]

    def register(reference: Callable) -> Callable:
        LIBRARY.define(schema)
        LIBRARY.impl(name, reference, "CPU")
        torch.library.register_fake(f"fuseline::{name}", fake, lib=LIBRARY)
        return reference

    return register
