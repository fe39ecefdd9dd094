"""Rows of the one table, and the clock that fills them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch


class Clock(Protocol):
    """Seconds that the device takes for a call, between two moments of its own."""

    def __call__(self, call: Callable[[], object], repeats: int = 20) -> float: ...


class CardClock:
    """Median of CUDA events; the L2 cache is filled with something else before each call."""

    def __init__(self) -> None:
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], object], repeats: int = 20) -> float:
        for _ in range(3):
            call()
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in pairs:
            self._flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


class HostClock:
    """For trials without a card."""

    def __call__(self, call: Callable[[], object], repeats: int = 1) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started


@dataclass(frozen=True)
class Limits:
    """What the card was measured to do in the same run: bytes moved and multiplications-and-additions (2 each), a s."""

    bandwidth: float
    matrix_rate: float


@dataclass
class Table:
    """In a file at any moment, if there is a `path`: who measures may be stopped."""

    path: Path | None = None
    title: str = ""
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    @staticmethod
    def resumed(path: Path) -> Table:
        """What another process has left in the file."""
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


def is_card_lost() -> bool:
    """Whether every further call of this process would raise what an earlier one has done."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def share_of(limit: float, needed: float, seconds: float) -> str:
    return f"{100 * needed / limit / seconds:.0f} %"
