"""Results written to files."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fuseline.api.config import ConfigError


def save_json(path: str, result: dict[str, object]) -> None:
    """Write whole or not at all. Raises ConfigError."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with partial.open("w") as file:
            json.dump(result, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        raise ConfigError(f"--save-result {path}: {error.strerror}") from error
