"""Rows of the table of results: one file, to which every stage adds."""

from __future__ import annotations

import platform
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch

from gpu_check.failures import unless_done


@dataclass
class Table:
    """With a `path`, the file is written after every row, because a measurement may be killed."""

    path: Path | None = None
    title: str = ""
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    @staticmethod
    def begun(path: Path, title: str) -> Table:
        """A new table without rows, in place of what the file held."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Table().text(title))
        return Table(path, title)

    @staticmethod
    def resumed(path: Path) -> Table:
        """The table another process left in the file."""
        title, _, _, _, *rows = path.read_text().splitlines()
        return Table(path, title.removeprefix("## "), [tuple(row[2:-2].split(" | ")) for row in rows])

    def add(self, what: str, value: str, share: str = "", goal: str = "", tell: bool = True) -> None:
        """Adds a row; prints it, unless not to `tell`."""
        row = tuple(" ".join(text.replace("|", "/").split()) for text in (what, value, share, goal))
        self.rows.append(row)
        if tell:
            print(f"  {what}: {value} {share}", flush=True)
        if self.path is not None:
            self.path.write_text(self.text(self.title))

    def text(self, title: str) -> str:
        head = [f"## {title}", "", "| what | measured | share of its limit | goal |", "|---|---|---|---|"]
        return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in self.rows)]) + "\n"


def run_part(name: str, call: Callable[[], object], table: Table, marks: Path) -> bool:
    """Runs a part of a stage and returns whether it went well; if not, the table and `marks` (failures.py) have it."""
    try:
        with unless_done(marks, name):
            call()
        return True
    except Exception as error:
        traceback.print_exc()
        table.add(name, f"FAILED: {type(error).__name__}: {str(error)[:100]}")
        return False


def title() -> str:
    """The machine, the commit and the versions, as the title of a table."""
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, python {platform.python_version()}"
    return f"{torch.cuda.get_device_name()}, {date.today()}, commit {commit or 'unknown'}, {versions}"


def is_gpu_lost() -> bool:
    """Whether every further call of this process would fail with an earlier error."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def share_of(limit: float, needed: float, seconds: float) -> str:
    return f"{100 * needed / limit / seconds:.0f} %"
