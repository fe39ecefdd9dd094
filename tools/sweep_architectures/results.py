"""The result of an architecture, and a file that keeps results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

KINDS = ("equal", "refused", "WRONG", "crash", "none")
OURS = "ours"
"""Speed class of a plan in which every op has a kernel of ours."""
UNTRIED = "not swept yet"


@dataclass(frozen=True)
class Result:
    """`speed`: OURS, or the ops of the regions that torch computes; empty for what is not served."""

    model_type: str
    kind: str
    """One of KINDS."""
    detail: str
    """In one line: the reason, or what was measured."""
    is_decoder: bool = True
    """Whether its only use is to generate text from text."""
    speed: str = ""
    seconds: float = 0.0

    def line(self) -> str:
        speed = f"[{self.speed}] " if self.speed else ""
        return f"{self.kind:<8}{self.model_type:<28}{self.seconds:5.1f} s  {speed}{self.detail[:300]}"


def one_line(text: str) -> str:
    return " ".join(text.split())


def read(path: Path) -> dict[str, Result]:
    """By model type; none if there is no such file."""
    lines: Sequence[str] = path.read_text().splitlines() if path.is_file() else ()
    results = (Result(**json.loads(line)) for line in lines)
    return {result.model_type: result for result in results}


def append(path: Path, result: Result) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")
