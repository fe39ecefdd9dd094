"""The npm package openai on a live server; tests/api/node holds its checks and the lockfile of its version."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "node"
UNREACHABLE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "ENOTCACHED", "E403")
"""npm's codes for a registry that this machine cannot reach."""


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed on this machine")
def test_the_npm_package(address: str) -> None:
    fetched = start(["npm", "ci", "--prefer-offline", "--no-audit", "--no-fund"])
    if fetched.returncode and any(code in fetched.stderr for code in UNREACHABLE):
        pytest.skip(f"npm cannot fetch the package here: {fetched.stderr.strip().splitlines()[0]}")
    assert fetched.returncode == 0, fetched.stdout + fetched.stderr
    assert "checks passed" in run(["node", "checks.mjs", f"{address}/v1", "key"])


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=240)


def run(command: list[str]) -> str:
    done = start(command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
