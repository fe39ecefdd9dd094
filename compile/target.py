"""The machine a model is compiled for; the only module of compile/ that reads environment variables."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Target:
    kind: str
    """cpu or cuda."""
    isa: str
    """Instruction set of the native kernels; for a GPU sm_90 or similar."""
    num_threads: int
    tensors: str = ""
    """torch device of tensors; empty: the kind's; cpu if a GPU's kernels are interpreted."""
    overlaps: bool = True
    """Whether kernels of csrc/cuda may start before the previous ones have ended, on GPUs that support it."""

    @property
    def device(self) -> str:
        return self.tensors or self.kind


CPU = Target("cpu", "", 1)
"""A target for code that needs only the kind of machine a graph is made for."""


class DeviceError(ValueError):
    """A requested device is not available; the message is one line."""


def detect_target(cpu_threads: int = 0, device: str = "cpu") -> Target:
    """Detects this machine's device: auto selects a GPU if there is one. Raises DeviceError.

    `cpu_threads` 0 uses every core this process may use. $FUSELINE_CUDA_PDL=0 disables the overlap of kernels.
    """
    import torch  # fuseline._C links to its libraries

    from fuseline import _C

    threads = cpu_threads or usable_cpus()
    missing = missing_for_cuda() if device in ("auto", "cuda") else ""
    if device == "cuda" and missing:
        raise DeviceError(f"--device cuda: {missing}. Available devices: cpu.")
    if device == "cpu" or missing:
        return Target("cpu", _C.cpu_isa(), threads)
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", f"sm_{major}{minor}", threads, overlaps=os.environ.get("FUSELINE_CUDA_PDL") != "0")


def missing_for_cuda() -> str:
    """Why models cannot run on a GPU here; empty if they can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no GPU, or no driver for it"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than sm_80"
    if find_spec("triton") is None:
        return "triton is not installed"
    return ""


def likely_kind(device: str) -> str:
    """Predicts the kind of machine of `device` without importing torch, which takes a second.

    Wrong only if there is a driver but no usable GPU. Raises DeviceError if there cannot be a GPU.
    """
    if device == "cpu":
        return "cpu"
    missing = _missing_at_first_sight()
    if missing and device == "cuda":
        raise DeviceError(f"--device cuda: {missing}. Available devices: cpu.")
    return "cpu" if missing else "cuda"


def _missing_at_first_sight() -> str:
    """Like missing_for_cuda, but judges by files and the driver's library alone."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return "torch is not installed"
    text = Path(torch.origin).with_name("version.py").read_text()
    if re.search(r"^cuda\b.*= None$", text, re.MULTILINE):
        version = re.search(r"^__version__ = '(.*)'", text, re.MULTILINE)
        return f"torch {version[1] if version else ''} is built without CUDA"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no GPU, or no driver for it"
    return ""


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


def keep_triton_kernels(cache_dir: str) -> None:
    """Lets Triton keep what it compiles in the cache, where later starts find it, unless $TRITON_CACHE_DIR is set."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(cache_dir or default_cache_dir()) / "triton"))


def cpu_features() -> str:
    """CPU features that code compiled for exactly this CPU depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
