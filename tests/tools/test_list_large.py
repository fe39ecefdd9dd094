"""`make lint` lists what is large and fails for none of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import list_large  # noqa: E402


def function(num_lines: int, parameters: str = "") -> str:
    return f"def f({parameters}):\n" + "    pass\n" * (num_lines - 1)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (function(80), []),
        (function(81), ["1: f, 81 lines"]),
        ("class A:\n    async def g(self, " + "a, b, c, d, e, f, g): ...\n", []),
        ("class A:\n    async def g(self, " + "a, b, c, d, /, e, *f, g, h): ...\n", ["2: g, 8 parameters"]),
        ("def f(): " + "\n    def g(a, b, c, d, e, f, g, **h): ...\n", ["2: g, 8 parameters"]),
        (function(90, "a, b, c, d, e, f, g, h"), ["1: f, 90 lines", "1: f, 8 parameters"]),
    ],
)
def test_large_functions(text: str, found: list[str]) -> None:
    assert list(list_large.large_functions(text)) == found


def test_large_files(tmp_path) -> None:
    folder = tmp_path / "api"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.py").write_text("x = 1\n" * 400)
    (folder / "b.py").write_text("x = 1\n" * 320 + function(81))
    (folder / "inner" / "c.cpp").write_text("\n" * 401)
    (folder / "d.json").write_text("\n" * 500)
    assert list(list_large.large(folder)) == [
        "api/b.py: 401 lines", "api/b.py:321: f, 81 lines", "api/inner/c.cpp: 401 lines",
    ]  # fmt: skip


def test_lint_lists_and_does_not_fail() -> None:
    script = ROOT / "tools" / "list_large.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0 and "files over 400 lines" in done.stdout
    rule = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert "ruff check" in rule and "list_large.py" in rule
