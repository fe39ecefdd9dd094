"""Tests the CUDA target on this machine's GPU, then measures it: one command, one table, about seven minutes.

    python3 tools/gpu_check [--wheels DIR] [--only build,tests,models,measure] [--out table.md]
    python3 tools/gpu_check --only build,tune      the choices of -O3, which the first command leaves out

Tests that failed last time run first. Failures are recorded immediately, so those of an aborted stage are known.

Needs the repository, a torch for CUDA with its triton, a compiler, and fuseline's missing dependencies as wheels in DIR
(docs/GPU.md says how to get them). Without a GPU it ends with status 2 and one line. A stage that fails or times out is
reported and the next one runs; the status is then 1.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_check import failures

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = ROOT / "build" / "gpu_check"
TESTS = (
    "test_triton_ops.py", "test_triton_attention.py", "test_triton_sampling.py", "test_cuda_kernels.py",
    "test_cuda_attention.py", "test_cuda_bulk_attention.py", "test_cuda_target.py", "test_piecewise.py",
    "test_batch_invariance.py",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """`seconds` is its time limit."""

    name: str
    seconds: int


STAGES = (Stage("build", 130), Stage("tests", 280), Stage("models", 180), Stage("measure", 260))
ASKED = (Stage("tune", 400),)
"""Stages that run only when named."""


def main() -> int:
    args = _arguments()
    if reason := why_no_gpu():
        print(f"gpu_check: error: {reason}", file=sys.stderr)
        return 2
    failed, begun = [], time.monotonic()
    for stage in STAGES + ASKED:
        if stage.name not in args.only:
            continue
        started = time.monotonic()
        if stage.name == "tests":
            failures.begin(WORK)
        problem = run(stage, args)
        if stage.name == "tests":
            print("".join(f"  failed: {test}\n" for test in failures.now(WORK)), end="")
        print(f"gpu_check: {stage.name}: {problem or 'ok'} ({time.monotonic() - started:.0f} s)", flush=True)
        failed += [stage.name] if problem else []
        if problem and stage.name == "build":
            break
    print(f"gpu_check: {'failed: ' + ', '.join(failed) if failed else 'all ok'}, {time.monotonic() - begun:.0f} s")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    names = [stage.name for stage in STAGES + ASKED]
    parser.add_argument("--wheels", type=Path, help="directory of wheels to use besides what is installed")
    default = ",".join(stage.name for stage in STAGES)
    parser.add_argument("--only", default=default, help=f"stages to run, of {','.join(names)}")
    parser.add_argument("--out", type=Path, default=WORK / "table.md", help="where the table goes besides the screen")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(names):
        parser.error(f"there is no stage {sorted(unknown)[0]!r}; stages: {', '.join(names)}")
    return args


def why_no_gpu() -> str:
    """Why nothing can be checked on this machine; empty if it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no GPU, or no driver for it"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than sm_80"
    return ""


def run(stage: Stage, args: argparse.Namespace) -> str:
    """Returns the error, or an empty string. Ends all its processes, so that the next stage has the GPU alone."""
    process = subprocess.Popen(command(stage.name, args), cwd=ROOT, env=environment(), preexec_fn=os.setpgrp)
    try:
        status = process.wait(stage.seconds)
        return f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return f"not done after {stage.seconds} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def command(name: str, args: argparse.Namespace) -> list[str]:
    here, python = Path(__file__).resolve().parent, sys.executable
    if name == "build":
        return [python, str(here / "build.py"), str(WORK), *([str(args.wheels.resolve())] if args.wheels else [])]
    if name == "tests":
        files = [str(next((ROOT / "tests").rglob(file))) for file in TESTS]
        spread = ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "load"] if has_xdist() else []
        plugin = ["-p", "gpu_check.on_gpu", "--failures", str(WORK)]
        return [python, "-P", "-m", "pytest", "-q", *plugin, "-k", "not compiles", *spread, *files]
    if name in ("models", "tune"):
        return [python, "-P", str(here / f"{name}.py")]
    return [python, "-P", str(here / "measure.py"), str(args.out.resolve())]


def has_xdist() -> bool:
    done = subprocess.run([sys.executable, "-c", "import xdist"], env=environment(), capture_output=True)
    return done.returncode == 0


def environment() -> dict[str, str]:
    paths = [str(WORK / "pkg"), str(WORK / "wheels"), str(ROOT / "tools"), str(ROOT / "tests" / "helpers")]
    programs = [str(WORK / "wheels" / "bin"), os.environ.get("PATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "PATH": os.pathsep.join(programs), "PYTHONUNBUFFERED": "1",
        "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(WORK / "triton"), "FUSELINE_CACHE_ROOT": str(WORK / "cache"),
    }  # fmt: skip

