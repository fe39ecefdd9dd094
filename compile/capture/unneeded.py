"""Packages that Transformers' and torch's modules import when they are there, and that a CPU has no use for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

UNNEEDED = ("triton",)
"""75 MiB, for kernels of GPUs; torch._dynamo, which Transformers imports, looks for it."""


@contextmanager
def without_unneeded() -> Iterator[None]:
    """Those that are not imported yet cannot be while this lasts. Nothing changes where there is a GPU."""
    hidden = [] if torch.cuda.is_available() else [name for name in UNNEEDED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
