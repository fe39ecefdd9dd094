"""Regions compiled by inductor in a separate process, once per distinct region and machine."""

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
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from fuseline.compile.backends.inductor.library import Kernel, RegionFileError, check_file, load_library
from fuseline.compile.cache.files import CacheError, read_file, write_file
from fuseline.compile.target import cpu_features, default_cache_dir

logger = logging.getLogger(__name__)
# Named, not imported: importing them loads compile-time dependencies (sympy: 36 MiB).
WORKER = (sys.executable, "-P", "-m", "fuseline.compile.backends.inductor.worker")
RECIPE = tuple(Path(__file__).with_name(name) for name in ("worker.py", "check.py"))
REGION_SECONDS = 180.0
"""Time limit per region; inductor needs 5 to 15 s, several times that on a busy machine."""
POLL_SECONDS = 0.5


def region_name(text: str) -> str:
    """Name of a region's artifact: SHA-256 of everything it depends on."""
    recipe = b"".join(path.read_bytes() for path in RECIPE)
    parts = [text.encode(), recipe, repr((torch.__version__, cpu_features())).encode()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def region_folder(cache_dir: str) -> Path:
    """Folder of artifacts, private to the user; a temporary folder if the cache is not writable."""
    folder = Path(cache_dir or default_cache_dir()) / "regions"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.warning("compiled regions are not cached in %s: %s", folder, error)
        return Path(tempfile.mkdtemp(prefix="fuseline-regions-"))


def load_kernels(names: list[str], folder: Path) -> dict[str, Kernel]:
    """Loads cached kernels. An unusable one is reported and skipped."""
    kernels: dict[str, Kernel] = {}
    for name in names:
        path = folder / f"{name}.so"
        try:
            check_file(path)
            kernels[name] = load_library(path)
        except FileNotFoundError:
            continue
        except (OSError, RegionFileError, RuntimeError) as error:
            logger.warning("a compiled region is not used: %s", " ".join(str(error).split())[:300])
    return kernels


def compile_regions(
    texts: Mapping[str, str], folder: Path, stop: threading.Event, num_threads: int = 1
) -> dict[str, Kernel]:
    """Kernels by name, from the cache or compiled now; failures are reported once and omitted.

    `num_threads`: torch's threads for regions that are not compiled.
    """
    kernels = load_kernels(list(texts), folder)
    refusals = {name: folder / f"{name}-{num_threads}.no" for name in texts}
    left = {name: text for name, text in texts.items() if name not in kernels and not _is_refused(refusals[name])}
    begin, reasons = time.perf_counter(), []
    while left and not stop.is_set():
        answers = _run_worker({"folder": str(folder), "num_threads": num_threads, "jobs": list(left.items())}, stop)
        for answer in answers:
            left.pop(answer["name"], None)
            if fault := answer["fault"]:
                _refuse(refusals[answer["name"]], fault)
        reasons += [answer["error"] or answer["fault"] for answer in answers if answer["error"] or answer["fault"]]
        kernels |= load_kernels([a["name"] for a in answers if not a["error"] and not a["fault"]], folder)
        if not any(answer["name"] for answer in answers):
            break
    if reasons and not stop.is_set():
        logger.warning("%d of %d regions stay with eager torch: %s", len(texts) - len(kernels), len(texts), reasons[0])
    logger.info("%d regions compiled in %.1f s", len(kernels), time.perf_counter() - begin)
    return kernels


def _is_refused(path: Path) -> bool:
    """Whether an earlier compilation was rejected for a fault."""
    try:
        logger.info("a region stays with eager torch: %s", read_file(path).decode(errors="replace"))
        return True
    except (OSError, CacheError):
        return False


def _refuse(path: Path, fault: str) -> None:
    try:
        write_file(path, fault.encode())
    except OSError as error:
        logger.debug("%s is not cached: %s", path, error)


def _run_worker(order: dict[str, object], stop: threading.Event) -> list[dict[str, str]]:
    """Returns the worker's answers; if it fails, the last is for its current job. Killed if slow or on `stop`."""
    answers: list[dict[str, str]] = []
    try:
        worker = subprocess.Popen(
            WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        return [_failure("", f"the compiler's process cannot start: {error}")]
    begun, reason = "", ""
    try:
        worker.stdin.write(json.dumps(order).encode() + b"\n")
        worker.stdin.flush()
        for line in _lines(worker, stop):
            begun = line.get("begins", "")
            answers += [] if begun else [line]
    except TimeoutError as error:
        reason = str(error)
    except BrokenPipeError:
        reason = "the compiler's process ended at once"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        status = worker.wait()
        worker.stdout.close()
    if begun or len(answers) < len(order["jobs"]):
        answers.append(_failure(begun, reason or f"the compiler ended without an answer (status {status})"))
    return answers


def _failure(name: str, error: str) -> dict[str, str]:
    return {"name": name, "error": error, "fault": ""}


def _lines(worker: subprocess.Popen, stop: threading.Event) -> Iterator[dict[str, str]]:
    """Yields lines of output. Raises TimeoutError."""
    deadline, pending = time.monotonic() + REGION_SECONDS, b""
    while not stop.is_set():
        if time.monotonic() > deadline:
            raise TimeoutError(f"compiling took more than {REGION_SECONDS:.0f} s")
        if not select.select([worker.stdout], [], [], POLL_SECONDS)[0]:
            continue
        data = os.read(worker.stdout.fileno(), 1 << 16)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            yield json.loads(line)
            deadline = time.monotonic() + REGION_SECONDS
