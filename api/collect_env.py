"""`fuseline collect-env`: versions and hardware, as a report of a fault should tell them."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import fuseline
from fuseline.api.config import read_environment
from fuseline.compile.target import likely_kind, missing_for_cuda, usable_cpus

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "triton", "fastapi", "uvicorn",
    "pydantic", "msgspec", "openai",
)  # fmt: skip
SECRETS = ("api_key",)


def run_collect_env(arguments: Sequence[str]) -> int:
    """Entry of the subcommand; returns the exit status."""
    argparse.ArgumentParser(prog="fuseline collect-env").parse_args(arguments)
    facts = [*_machine(), *_packages(), *_variables()]
    width = max(len(name) for name, _ in facts)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts))
    return 0


def _machine() -> list[tuple[str, str]]:
    import torch

    from fuseline import _C

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    gpu = missing_for_cuda() or torch.cuda.get_device_name()
    return [
        ("fuseline", fuseline.__version__),
        ("python", f"{sys.version.split()[0]} ({sys.executable})"),
        ("platform", platform.platform()),
        ("libc", " ".join(platform.libc_ver())),
        ("processor", f"{platform.machine()}, {usable_cpus()} of {os.cpu_count()} cores usable"),
        ("instruction sets", f"{_C.cpu_isa()} of {', '.join(_C.available_isas())}"),
        ("memory", f"{memory:.1f} GiB"),
        ("device", likely_kind("auto")),
        ("GPU", gpu),
        ("CUDA of torch", str(torch.version.cuda)),
    ]


def _packages() -> list[tuple[str, str]]:
    found = []
    for name in PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            found.append((name, "not installed"))
    return found


def _variables() -> list[tuple[str, str]]:
    """The server's environment variables that are set, without secrets."""
    given = {name: value for name, value in asdict(read_environment()).items() if value}
    return [(f"FUSELINE_{name.upper()}", "***" if name in SECRETS else value) for name, value in given.items()]
