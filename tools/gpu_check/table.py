"""Rows of the table of results."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from fuseline.compile.tuning.clock import Clock
from fuseline.compile.tuning.limits import Limits

__all__ = ["Clock", "Limits", "Table", "is_gpu_lost", "microseconds", "share_of"]


@dataclass
class Table:
    """With a `path`, the file is written after every row, because a measurement may be killed."""

    path: Path | None = None
    title: str = ""
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    @staticmethod
    def resumed(path: Path) -> Table:
        """The table another process left in the file."""
        title, _, _, _, *rows = path.read_text().splitlines()
        return Table(path, title.removeprefix("## "), [tuple(row[2:-2].split(" | ")) for row in rows])

    def add(self, what: str, value: str, share: str = "", goal: str = "") -> None:
        row = tuple(" ".join(text.replace("|", "/").split()) for text in (what, value, share, goal))
        self.rows.append(row)
        print(f"  {what}: {value} {share}", flush=True)
        if self.path is not None:
            self.path.write_text(self.text(self.title))

    def text(self, title: str) -> str:
        head = [f"## {title}", "", "| what | measured | share of its limit | goal |", "|---|---|---|---|"]
        return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in self.rows)]) + "\n"


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
