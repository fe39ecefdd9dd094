"""The npm package openai on a live server; tests/api/node holds its checks and the lockfile of its version."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "node"


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed on this machine")
def test_the_npm_package(address: str) -> None:
    run(["npm", "ci", "--prefer-offline", "--no-audit", "--no-fund"])
    assert "checks passed" in run(["node", "checks.mjs", f"{address}/v1", "key"])


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
