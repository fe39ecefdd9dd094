"""Settings of a checkpoint: config.json of Transformers, or what params.json of Mistral's format says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuseline.compile.mistral_params import config_of

CONFIG, PARAMS = "config.json", "params.json"


class ConfigFileError(ValueError):
    """One line that names the file."""


def config_path(folder: str | Path, config_format: str = "auto") -> Path:
    """The file of a checkpoint's settings, which may not be there.

    config_format: hf for config.json, mistral for params.json, auto for the first of them that there is.
    """
    own, params = Path(folder) / CONFIG, Path(folder) / PARAMS
    is_params = config_format == "mistral" or (config_format == "auto" and not own.is_file() and params.is_file())
    return params if is_params else own


def read_stored_config(folder: str | Path, config_format: str = "auto") -> dict[str, Any]:
    """The content of config.json, or its like made from params.json. Raises ConfigFileError."""
    path = config_path(folder, config_format)
    if not path.is_file():
        cure = "give a Transformers checkpoint" if path.name == CONFIG else "leave --config-format out"
        raise ConfigFileError(f"{folder} has no {path.name}; {cure}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigFileError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigFileError(f"{path} is no JSON object; give a Transformers checkpoint")
    try:
        return dict(content) if path.name == CONFIG else config_of(content)
    except ValueError as error:
        raise ConfigFileError(f"{path}: {error}") from error
