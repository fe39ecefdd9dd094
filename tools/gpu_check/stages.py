"""Tests the CUDA target on this machine's GPU, then measures it: one command, one table, at most eight minutes.

    python3 tools/gpu_check [--wheels DIR] [--prebuilt DIR] [--seconds 480] [--out table.md]
    python3 tools/gpu_check --only build,serve      some of build, tests, models, serve, measure, quantized, tune

Tests that failed last time run first. Failures are recorded as they occur, so those of a stage that is cut are known.

Needs the repository, a torch for CUDA with its triton, a compiler, and fuseline's missing dependencies as wheels in DIR
(docs/GPU.md says how to get them). Without a GPU it ends with status 2 and one line. A stage that fails or times out is
reported and the next one runs; the status is then 1. A stage takes no time that the later ones need (`least`).
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
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
    "test_cuda_attention.py", "test_cuda_bulk_attention.py", "test_cuda_prefill.py", "test_cuda_persistent.py",
    "test_cuda_target.py", "test_piecewise.py", "test_batch_invariance.py", "test_code_rows.py",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """`seconds`: its time limit; `least`: what earlier stages leave of the whole time for it."""

    name: str
    seconds: int
    least: int


STAGES = (
    Stage("build", 130, 60), Stage("tests", 200, 90), Stage("models", 120, 75), Stage("serve", 150, 80),
    Stage("measure", 180, 90), Stage("quantized", 100, 40), Stage("tune", 180, 30),
)  # fmt: skip


def main() -> int:
    args = _arguments()
    if reason := why_no_gpu():
        print(f"gpu_check: error: {reason}", file=sys.stderr)
        return 2
    from gpu_check import table  # needs torch

    table.Table.begun(args.out, table.title())
    failed, begun = [], time.monotonic()
    stages = [stage for stage in STAGES if stage.name in args.only]
    for at, stage in enumerate(stages):
        left = args.seconds - (time.monotonic() - begun) - sum(later.least for later in stages[at + 1 :])
        problem = run_and_tell(stage, args, min(stage.seconds, max(1, int(left))))
        failed += [stage.name] if problem else []
        if problem and stage.name == "build":
            break
    print(args.out.read_text(), end="")
    print(f"gpu_check: {'failed: ' + ', '.join(failed) if failed else 'all ok'}, {time.monotonic() - begun:.0f} s")
    return 1 if failed else 0


def run_and_tell(stage: Stage, args: argparse.Namespace, seconds: int) -> str:
    """Runs a stage; prints what failed in it, and adds that to the table. Returns the problem, or an empty string."""
    from gpu_check.table import Table

    started, marks = time.monotonic(), marks_of(stage.name)
    shutil.rmtree(marks, ignore_errors=True)
    if stage.name == "tests":
        failures.begin(WORK)
    problem = run(stage, args, seconds)
    undone = [*(failures.now(WORK) if stage.name == "tests" else []), *failures.undone(marks)]
    print("".join(f"  failed: {what}\n" for what in undone), end="")
    took = f"{time.monotonic() - started:.0f} s"
    print(f"gpu_check: {stage.name}: {problem or 'ok'} ({took})", flush=True)
    table = Table.resumed(args.out)
    for what in undone:
        table.add(f"{stage.name}: {what}", "failed, or not done", tell=False)
    table.add(f"stage {stage.name}", problem or "ok", took, tell=False)
    return problem


def marks_of(stage: str) -> Path:
    """Where a stage marks what is not done (failures.py)."""
    return WORK / "undone" / stage


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    names = [stage.name for stage in STAGES]
    parser.add_argument("--wheels", type=Path, help="directory of wheels to use besides what is installed")
    text = "directory of libraries (_C*.so, _cuda.so) built elsewhere for this Python, instead of building them"
    parser.add_argument("--prebuilt", type=Path, help=text)
    parser.add_argument("--only", default=",".join(names), help=f"stages to run, of {','.join(names)}")
    parser.add_argument("--seconds", type=int, default=480, help="time limit of all stages together")
    parser.add_argument("--out", type=Path, default=WORK / "table.md", help="where the table goes besides the screen")
    args = parser.parse_args()
    args.only, args.out = args.only.split(","), args.out.resolve()
    if unknown := set(args.only) - set(names):
        parser.error(f"there is no stage {sorted(unknown)[0]!r}; stages: {', '.join(names)}")
    if args.prebuilt and not any(args.prebuilt.glob("_C*.so")):
        parser.error(f"--prebuilt: {args.prebuilt} holds no _C*.so")
    return args


def why_no_gpu() -> str:
    """Why nothing can be checked on this machine; empty if it can."""
    try:
        # By its file: before the stage `build` there is no package.
        return runpy.run_path(str(ROOT / "compile" / "target.py"))["missing_for_cuda"]()
    except ImportError:
        return "torch is not installed"


def run(stage: Stage, args: argparse.Namespace, seconds: int) -> str:
    """Returns the error, or an empty string. Ends all its processes, so that the next stage has the GPU alone."""
    process = subprocess.Popen(command(stage.name, args), cwd=ROOT, env=environment(), preexec_fn=os.setpgrp)
    try:
        status = process.wait(seconds)
        return f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return f"not done after {seconds} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def command(name: str, args: argparse.Namespace) -> list[str]:
    here, python = Path(__file__).resolve().parent, sys.executable
    if name == "build":
        given = [f"--{key}={getattr(args, key).resolve()}" for key in ("wheels", "prebuilt") if getattr(args, key)]
        return [python, str(here / "build.py"), str(WORK), *given]
    if name == "tests":
        files = [str(next((ROOT / "tests").rglob(file))) for file in TESTS]
        spread = ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "load"] if has_xdist() else []
        plugin = ["-p", "gpu_check.on_gpu", "--failures", str(WORK)]
        return [python, "-P", "-m", "pytest", "-q", *plugin, "-k", "not compiles", *spread, *files]
    results = {"models": [str(marks_of(name))], "tune": [str(args.out)]}
    return [python, "-P", str(here / f"{name}.py"), *results.get(name, [str(args.out), str(marks_of(name))])]


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

