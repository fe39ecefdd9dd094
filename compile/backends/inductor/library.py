"""Compiled regions on disk: a shared library followed by a line with its SHA-256.

A rejected region leaves the reason instead: <name>-<threads>.no, a file of compile/cache.py. Loading a library runs
its code, so it is loaded only if intact and from a folder that no other user can write.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fuseline.compile.cache.files import write_whole

MAGIC = b"\nfuseline region "
TAIL_BYTES = len(MAGIC) + 64


Kernel = Callable[[list[Tensor]], object]
"""A compiled region: takes the inputs and the memory of the outputs."""


class RegionFileError(ValueError):
    """The file must not be loaded; the message says why."""


def seal(path: Path, library: bytes) -> None:
    """Writes the library atomically. Raises OSError."""
    write_whole(path, library + MAGIC + hashlib.sha256(library).hexdigest().encode())


def load_library(path: Path) -> Kernel:
    """Loads the library. Raises RuntimeError."""
    return torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1).run


def check_file(path: Path) -> None:
    """Raises FileNotFoundError, OSError, or RegionFileError for a damaged file or an untrusted owner."""
    for place in (path.parent, path):
        state = place.stat()
        if state.st_uid != os.geteuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise RegionFileError(f"{place} can be written by other users; chmod go-w it or take another cache folder")
    data = path.read_bytes()
    library, tail = data[:-TAIL_BYTES], data[-TAIL_BYTES:]
    if tail != MAGIC + hashlib.sha256(library).hexdigest().encode():
        raise RegionFileError(f"{path} is damaged")
