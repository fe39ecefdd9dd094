"""Code run by a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

SECONDS = 300


def run_python(code: str, *arguments: str, num_threads: int = 1) -> str:
    """Returns what the code prints. It imports what this process can; its error fails the test with its traceback."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": str(num_threads),
    }
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()
