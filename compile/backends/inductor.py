"""Regions compiled by inductor, in a process of its own, once per distinct region and machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fuseline.compile.backends import region_worker
from fuseline.compile.backends.region_file import RegionFileError, check_file
from fuseline.compile.target import cpu_features, default_cache_dir

logger = logging.getLogger(__name__)
WORKER = (sys.executable, "-P", "-m", region_worker.__name__)
REGION_SECONDS = 180.0
"""What one region may take; inductor needs 5 to 15 s, several times that on a busy machine."""
POLL_SECONDS = 0.5
Kernel = Callable[[list[Tensor]], object]
"""A compiled region: takes the inputs and the memory of the outputs."""


def region_name(text: str) -> str:
    """Name of a region's artifact: SHA-256 of all that it depends on."""
    recipe = Path(region_worker.__file__).read_bytes()
    parts = [text.encode(), recipe, repr((torch.__version__, cpu_features())).encode()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def region_folder(cache_dir: str) -> Path:
    """Where artifacts are kept: private to the user; a temporary folder where the cache cannot be written."""
    folder = Path(cache_dir or default_cache_dir()) / "regions"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.warning("compiled regions are not cached in %s: %s", folder, error)
        return Path(tempfile.mkdtemp(prefix="fuseline-regions-"))


def load_kernels(names: list[str], folder: Path) -> dict[str, Kernel]:
    """Those in the cache. One that cannot be used is reported and left out."""
    kernels: dict[str, Kernel] = {}
    for name in names:
        path = folder / f"{name}.so"
        try:
            check_file(path)
            kernels[name] = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1).run
        except FileNotFoundError:
            continue
        except (OSError, RegionFileError, RuntimeError) as error:
            logger.warning("a compiled region is not used: %s", " ".join(str(error).split())[:300])
    return kernels


def compile_regions(texts: Mapping[str, str], folder: Path, stop: threading.Event) -> dict[str, Kernel]:
    """Kernels by name, from the cache or compiled now; what fails is reported once and missing in the result."""
    kernels = load_kernels(list(texts), folder)
    jobs = [(name, text) for name, text in texts.items() if name not in kernels]
    if not jobs:
        return kernels
    begin, errors, answered = time.perf_counter(), [], set()
    for answer in _run_worker({"folder": str(folder), "jobs": jobs}, stop):
        errors += [answer["error"]] if answer["error"] else []
        answered.add(answer.get("name"))
    made = [name for name, _ in jobs if name in answered]
    kernels |= load_kernels(made, folder)
    missing = len(texts) - len(kernels)
    if missing and not stop.is_set():
        reason = errors[0] if errors else "the compiler ended without an answer"
        logger.warning("%d of %d regions stay with eager torch: %s", missing, len(texts), reason)
    logger.info("%d regions compiled in %.1f s", len(kernels), time.perf_counter() - begin)
    return kernels


def _run_worker(order: dict[str, object], stop: threading.Event) -> Iterator[dict]:
    """Answers of the worker; it and what it started are killed when it is too slow, or on `stop`."""
    try:
        worker = subprocess.Popen(
            WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        yield {"error": f"the compiler's process cannot start: {error}"}
        return
    try:
        worker.stdin.write(json.dumps(order).encode() + b"\n")
        worker.stdin.flush()
        yield from _answers(worker, stop)
    except BrokenPipeError:
        yield {"error": "the compiler's process ended at once"}
    finally:
        try:
            os.killpg(worker.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        worker.wait()
        worker.stdout.close()


def _answers(worker: subprocess.Popen, stop: threading.Event) -> Iterator[dict]:
    deadline, pending = time.monotonic() + REGION_SECONDS, b""
    while not stop.is_set():
        if time.monotonic() > deadline:
            yield {"error": f"compiling took more than {REGION_SECONDS:.0f} s"}
            return
        if not select.select([worker.stdout], [], [], POLL_SECONDS)[0]:
            continue
        data = os.read(worker.stdout.fileno(), 1 << 16)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            yield json.loads(line)
            deadline = time.monotonic() + REGION_SECONDS
