"""`--config FILE`: a YAML mapping of long flag names, turned into arguments (SPEC 21)."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from fuseline.api import cli_tables as tables
from fuseline.api.cli_flags import all_flags
from fuseline.api.config import ConfigError


def read_arguments(file: str) -> list[str]:
    """Arguments that mean what the file says. `model` becomes --model. Raises ConfigError."""
    path = Path(file)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--config {file}: the file's name must end in .yaml or .yml")
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"--config: there is no file {file}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {file} cannot be read: {reason}") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"--config {file}: the top level must be one mapping of flag names to values")
    return [argument for key, value in (content or {}).items() for argument in _arguments(str(key), value)]


def _arguments(key: str, value: object) -> list[str]:
    name = key.lstrip("-").replace("-", "_")
    option = "--" + name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return _boolean(name, option, value)
    if isinstance(value, list) and _kind(name) not in ("json-list", "json"):
        if name in tables.REPEATABLE:
            return [f"{option}={_text(item)}" for item in value]
        return [option, *map(_text, value)] if value else []
    return [f"{option}={_text(value)}"]


def _boolean(name: str, option: str, value: bool) -> list[str]:
    if _kind(name) == "bool-value":
        return [f"{option}={str(value).lower()}"]
    if value:
        return [option]
    is_default_on = name in all_flags() and all_flags()[name].default is True
    return [f"--no-{option[2:]}"] if is_default_on else []


def _kind(name: str) -> str:
    return all_flags()[name].kind if name in all_flags() else ""


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
