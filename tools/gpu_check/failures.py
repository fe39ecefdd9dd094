"""Failed tests: recorded one per line as they fail, and read by the next run."""

from __future__ import annotations

from pathlib import Path

NOW, BEFORE = "failed.txt", "failed_before.txt"


def begin(folder: Path) -> None:
    """Starts a run: its failures replace those of the last run, if that one recorded any."""
    folder.mkdir(parents=True, exist_ok=True)
    if found := now(folder):
        (folder / BEFORE).write_text("".join(f"{test}\n" for test in found))
    (folder / NOW).write_text("")


def add(folder: Path, test: str) -> None:
    with (folder / NOW).open("a") as file:
        file.write(f"{test}\n")


def now(folder: Path) -> list[str]:
    return _lines(folder / NOW)


def before(folder: Path) -> list[str]:
    return _lines(folder / BEFORE)


def _lines(path: Path) -> list[str]:
    return list(dict.fromkeys(path.read_text().split("\n")[:-1])) if path.exists() else []
