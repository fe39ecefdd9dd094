"""Cache files: named by a hash of their dependencies, written atomically, verified before use.

    first line   fuseline cache <SHA-256 of the rest>
    the rest     the body

One folder per kind below one root; a kernel that Triton has compiled is a folder of files that Triton writes and reads.
Needs no torch, so `fuseline cache` starts fast.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"fuseline cache "
KINDS = {
    "graphs": "captured graph",
    "models": "graph after all passes",
    "weights": "where the checkpoint's tensors go",
    "regions": "compiled region",
    "tuned": "which kernels are fastest",
    "templates": "chat template that has been tried",
    "tokenizers": "tokenizer, resolved from its files",
    "triton": "kernel compiled by Triton",
    "gguf": "settings of a model in GGUF files",
}
FOLDERS = ("triton", "gguf")
"""Kinds whose entries are folders."""
MAX_BYTES = 4 << 30
"""Limit of all files together; least recently used ones are deleted first."""


class CacheError(ValueError):
    """The file must not be used; the message gives the reason."""


@dataclass(frozen=True)
class Entry:
    path: Path
    kind: str
    """Folder, one of KINDS."""
    num_bytes: int
    used: float
    """Seconds since the epoch when it was last written or read."""


def read_file(path: Path) -> bytes:
    """Returns the body. Raises FileNotFoundError, OSError, and CacheError if it is damaged."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except NotADirectoryError as error:
        raise FileNotFoundError(str(error)) from error
    if head != MAGIC + hashlib.sha256(body).hexdigest().encode():
        raise CacheError("the file is damaged")
    with suppress(OSError):  # a read-only cache keeps no access times, and needs none
        os.utime(path)
    return body


def write_file(path: Path, body: bytes) -> None:
    """Writes the file atomically, then deletes old files beyond the limit. Raises OSError."""
    write_whole(path, MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    prune(path.parent.parent, MAX_BYTES, keep=path)


def write_whole(path: Path, data: bytes) -> None:
    """Writes the file atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


def entries(root: Path) -> list[Entry]:
    """Cached files, most recently used first; other files and folders are ignored."""
    found = [_entry(path, kind) for kind in KINDS for path in _members(root / kind)]
    return sorted((entry for entry in found if entry is not None), key=lambda entry: -entry.used)


def prune(root: Path, max_bytes: int, keep: Path | None = None) -> None:
    """Deletes the least recently used files until the rest is within the limit; `keep` stays."""
    total = 0
    for entry in entries(root):
        total += entry.num_bytes
        if total > max_bytes and entry.path != keep:
            with suppress(OSError):  # another process was faster, or the cache is read-only
                _remove(entry)


def clear(root: Path) -> list[Entry]:
    """Deletes all files and returns them. Raises OSError."""
    found = entries(root)
    for entry in found:
        with suppress(FileNotFoundError):
            _remove(entry)
    return found


def _members(folder: Path) -> Iterator[Path]:
    is_member = os.DirEntry.is_dir if folder.name in FOLDERS else os.DirEntry.is_file
    with suppress(OSError), os.scandir(folder) as found:
        yield from (Path(item.path) for item in found if is_member(item, follow_symlinks=False))


def _entry(path: Path, kind: str) -> Entry | None:
    try:
        states = [file.stat() for file in (path.iterdir() if kind in FOLDERS else (path,))]
        return Entry(path, kind, sum(state.st_size for state in states), path.stat().st_mtime)
    except FileNotFoundError:
        return None


def _remove(entry: Entry) -> None:
    if entry.kind in FOLDERS:
        shutil.rmtree(entry.path)
    else:
        entry.path.unlink()
