"""Tests write no cache outside the repository's own folder, and run Triton's kernels in its interpreter.

Triton's own library is interpreted only if the variable is set before anything, torch's compiler included, imports it.
Threads of torch that wait sleep: models take all cores, as other tests that run beside them do, and threads that spin
where there is no core for them made tests ten times slower.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path

os.environ.setdefault("FUSELINE_CACHE_ROOT", str(Path(__file__).resolve().parents[1] / ".cache" / "fuseline"))
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_unconfigure() -> None:
    """A process that cannot end after its tests shows its stacks and is ended, instead of holding the whole run."""
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)
