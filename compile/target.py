"""The machine that a model is compiled for; the one reader of environment variables in compile/."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  fuseline._C links to its libraries


@dataclass(frozen=True)
class Target:
    kind: str
    """cpu."""
    isa: str
    """Instruction set of the native kernels."""
    num_threads: int


def detect_target() -> Target:
    """The best device of this machine."""
    from fuseline import _C

    return Target("cpu", _C.cpu_isa(), _C.num_threads())


def default_cache_dir() -> Path:
    """$FUSELINE_CACHE_ROOT or ~/.cache/fuseline."""
    return Path(os.environ.get("FUSELINE_CACHE_ROOT") or Path.home() / ".cache" / "fuseline")
