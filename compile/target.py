"""The machine that a model is compiled for; the one reader of environment variables in compile/."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Target:
    kind: str
    """cpu."""
    isa: str
    """Instruction set of the native kernels."""
    num_threads: int


def detect_target(cpu_threads: int = 0) -> Target:
    """The best device of this machine; `cpu_threads` 0 takes every core this process may use."""
    import torch  # noqa: F401  fuseline._C links to its libraries

    from fuseline import _C

    return Target("cpu", _C.cpu_isa(), cpu_threads or usable_cpus())


def usable_cpus(quota_file: Path = CGROUP_QUOTA) -> int:
    """Cores this process may run on: its affinity, and the quota of its control group (docs: cgroup v2, cpu.max)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()[:2]
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        # No control group, or no limit ("max").
        return cores


def default_cache_dir() -> Path:
    """$FUSELINE_CACHE_ROOT or ~/.cache/fuseline."""
    return Path(os.environ.get("FUSELINE_CACHE_ROOT") or Path.home() / ".cache" / "fuseline")


def cpu_features() -> str:
    """What code compiled for exactly this CPU depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
