"""`--config FILE`: a YAML mapping of long flag names, turned into arguments (SPEC 21)."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from fuseline.api.cli_flags import all_flags
from fuseline.api.config import ConfigError

OBJECTS = ("json", "levels", "pairs")
"""Kinds of flags that take a mapping."""


def read_arguments(file: str) -> list[str]:
    """Arguments that mean what the file says. `model` becomes --model. Raises ConfigError."""
    path = Path(file)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--config {file}: the file's name must end in .yaml or .yml")
    try:
        content = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"--config: there is no file {file}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {file} cannot be read: {reason}") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"--config {file}: the top level must be one mapping of flag names to values")
    return [argument for key, value in (content or {}).items() for argument in _arguments(str(key), value)]


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"{twice} is given twice")
        return super().construct_mapping(node, deep)


def _arguments(key: str, value: object) -> list[str]:
    name = key.lstrip("-").replace("-", "_")
    option = "--" + name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return _boolean(name, option, value)
    kind = _kind(name)
    if isinstance(value, list) and kind not in ("json-list", ""):
        if kind == "floats":
            return [f"{option}={','.join(map(_text, value))}"]
        if kind != "many":
            raise ConfigError(f"{option}: takes one value, and the file gives it a list")
        return [f"{option}={_text(item)}" for item in value]
    if isinstance(value, dict) and kind not in (*OBJECTS, ""):
        raise ConfigError(f"{option}: takes no mapping, and the file gives it one")
    return [f"{option}={_text(value)}"]


def _boolean(name: str, option: str, value: bool) -> list[str]:
    kind = _kind(name)
    if kind == "bool-value":
        return [f"{option}={str(value).lower()}"]
    if value and kind not in ("bool", ""):
        raise ConfigError(f"{option}: takes a value, and the file says true")
    if value:
        return [option]
    is_default_on = name in all_flags() and all_flags()[name].default is True
    return [f"--no-{option[2:]}"] if is_default_on else []


def _kind(name: str) -> str:
    return all_flags()[name].kind if name in all_flags() else ""


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
