"""`fuseline bench startup`: from exec to the first streamed token, phase by phase, cold and warm.

    fuseline bench startup MODEL [flags of serve] [--runs N] [--save-result FILE]

Each phase begins where the one before ended, so nothing between exec and token is left out. Cold: an empty cache in a
temporary folder, so that the model is captured; warm: what that run left there. The checkpoint is in the page cache.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fuseline.api.bench.files import save_json
from fuseline.api.config import ConfigError

MAX_RUNS = 20
PHASES = {
    "interpreter": "Python starts",
    "settings": "flags, config.json, the port",
    "engine imports": "the engine's process starts and imports torch",
    "graph": "captured and lowered, or read from the cache",
    "weights": "read and packed",
    "engine": "plan, KV cache, scheduler",
    "application": "tokenizer, routes",
    "first token": "HTTP request to first event",
}
REQUEST_TIMEOUT, STOP_TIMEOUT = 600.0, 30.0


@dataclass(frozen=True)
class Start:
    """One start. Seconds of each of PHASES; their sum is `total`."""

    name: str
    phases: dict[str, float]
    total: float
    peak_bytes: dict[str, int]
    """Peak resident memory of the server's process and of the engine's."""


def run_startup(arguments: Sequence[str]) -> int:
    """Entry of the subcommand; returns the exit status."""
    options, serve_arguments = _parser().parse_known_args(arguments)
    if not 1 <= options.runs <= MAX_RUNS:
        raise ConfigError(f"--runs must be 1 to {MAX_RUNS}")
    read_once(serve_arguments)
    starts: list[Start] = []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory(prefix="fuseline-startup-") as cache:
            starts += [time_start(name, [*serve_arguments, "--cache-dir", cache]) for name in ("cold", "warm")]
    best = [min((s for s in starts if s.name == name), key=lambda s: s.total) for name in ("cold", "warm")]
    values = {"arguments": serve_arguments, "starts": [vars(start) for start in starts]}
    print(json.dumps(values, indent=2) if options.json else table(best, options.runs))
    if options.save_result:
        save_json(options.save_result, values)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fuseline bench startup", usage="fuseline bench startup MODEL [options] [flags of fuseline serve]",
        description="Times a server's start, cold (nothing cached) and warm.", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=1, help="the fastest of so many is shown")
    parser.add_argument("--json", action="store_true", help="print all runs as JSON")
    parser.add_argument("--save-result", default="", metavar="FILE", help="write all runs as JSON")
    return parser


def read_once(serve_arguments: Sequence[str]) -> None:
    """The checkpoint's files into the page cache: what is timed is the program, not the disk."""
    for path in sorted(Path(next(iter(serve_arguments), "")).glob("*.*")):
        if path.is_file() and path.suffix in (".safetensors", ".bin", ".json"):
            with open(path, "rb") as file:
                while file.read(16 << 20):
                    pass


def time_start(name: str, serve_arguments: Sequence[str]) -> Start:
    """Start a server, ask for a token, end it. Raises ConfigError when it does not start."""
    port = _free_port()
    command = [*serve_arguments, "--host", "127.0.0.1", "--port", str(port)]
    begin = time.time()
    with _server(command) as (process, moments):
        times = {phase: at for at, phase in moments}
        if "application" not in times:
            raise ConfigError(f"the server did not start: {_last_line(process)}")
        _first_token(port)
        times["first token"] = time.time()
        memory = _peak_memory(process.pid)
    return Start(name, durations(begin, times), times["first token"] - begin, memory)


def durations(begin: float, times: dict[str, float]) -> dict[str, float]:
    """Seconds of each phase, from the moments at which they end; a phase that was not told took none of its own."""
    seconds = {}
    for phase in PHASES:
        end = max(times.get(phase, begin), begin)
        seconds[phase], begin = end - begin, end
    return seconds


@contextmanager
def _server(arguments: Sequence[str]) -> Iterator[tuple[subprocess.Popen, Iterator[tuple[float, str]]]]:
    """The process, and its phases until the last before a request."""
    read, write = os.pipe()
    command = [sys.executable, "-P", "-m", "fuseline.api.bench.startup_child", str(write), *arguments]
    process = subprocess.Popen(command, pass_fds=[write], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    os.close(write)
    try:
        with os.fdopen(read) as lines:
            yield process, _moments(lines)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _moments(lines: Iterator[str]) -> Iterator[tuple[float, str]]:
    for line in lines:
        at, _, phase = line.strip().partition(" ")
        yield float(at), phase
        if phase == "application":
            return


def _last_line(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=STOP_TIMEOUT)
    return (errors.strip().splitlines() or ["no reason given"])[-1].removeprefix("fuseline: error: ")


def _first_token(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT)
    body = {"prompt": [1, 2, 3, 4], "max_tokens": 1, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    line = answer.readline()
    if answer.status != 200 or not line.startswith(b"data:"):
        raise ConfigError(f"the server answered {answer.status}: {line.decode(errors='replace')[:300]}")
    connection.close()


def _peak_memory(server: int) -> dict[str, int]:
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    found = {"server": _peak(server), "engine": max((_peak(int(child)) for child in children), default=0)}
    return found


def _peak(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def table(starts: Sequence[Start], runs: int) -> str:
    """Phases as rows, starts as columns."""
    lines = [f"{'seconds':<16}" + "".join(f"{start.name:>9}" for start in starts)]
    for phase, text in PHASES.items():
        lines.append(f"{phase:<16}" + "".join(f"{start.phases[phase]:>9.2f}" for start in starts) + f"  {text}")
    lines.append(f"{'total':<16}" + "".join(f"{s.total:>9.2f}" for s in starts) + f"  fastest of {runs}")
    for process in ("server", "engine"):
        cells = "".join(f"{start.peak_bytes[process] / 2**20:>9.0f}" for start in starts)
        lines.append(f"{'MiB, ' + process:<16}{cells}  peak resident memory")
    return "\n".join(lines)
