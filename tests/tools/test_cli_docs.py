"""docs/FLAGS.md follows from the fields."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_flag_docs_are_up_to_date() -> None:
    command = [sys.executable, "-P", str(ROOT / "tools" / "make_flag_docs.py"), "--check"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0, "run tools/make_flag_docs.py"
