"""The file by which a checkpoint directory stands for GGUF files (folder.py)."""

from __future__ import annotations

import json
from pathlib import Path

TABLE = "gguf.json"


def is_unpacked(folder: Path) -> bool:
    """Whether a checkpoint directory stands for GGUF files."""
    return (folder / TABLE).is_file()


def source_of(folder: Path) -> Path:
    """The first GGUF file that the directory stands for."""
    return Path(json.loads((folder / TABLE).read_text())["files"][0])
