"""Failed tests, one per line as they fail, also for the next run; of other stages what has begun and is not done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

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


@contextmanager
def unless_done(folder: Path, what: str) -> Iterator[None]:
    """Lists `what` in `undone` until the body has ended without an exception, also if its process dies or is cut."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / quote(what, safe=" ")
    mark.touch()
    yield
    mark.unlink()


def undone(folder: Path) -> list[str]:
    """What has begun and not ended well, in the order of its names."""
    return sorted(unquote(mark.name) for mark in folder.iterdir()) if folder.is_dir() else []


def _lines(path: Path) -> list[str]:
    return list(dict.fromkeys(path.read_text().split("\n")[:-1])) if path.exists() else []
