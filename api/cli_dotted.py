"""Keys of JSON flags given one at a time: -O.level=1, --hf-overrides.text_config.rope_theta 1e6, --x.list+ a,b."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from fuseline.api import cli_tables as tables
from fuseline.api.cli_flags import all_flags

DOTTED = re.compile(r"(--?[A-Za-z][A-Za-z0-9_-]*)\.([^=\s]+)(?:=(.*))?", re.DOTALL)


def fold_dotted(arguments: Sequence[str]) -> list[str]:
    """The arguments with every --x.y.z=v as --x={"y": {"z": v}}; several keys of a flag are merged by the parser."""
    result: list[str] = []
    left, options = list(arguments), _json_options()
    while left:
        argument = left.pop(0)
        found = DOTTED.fullmatch(argument)
        if not found or found[1] not in options:
            result.append(argument)
            continue
        value = found[3] if found[3] is not None else left.pop(0) if left else "true"
        result += [found[1], json.dumps(_nested(found[2].split("."), value))]
    return result


def _json_options() -> set[str]:
    flags = [flag for flag in all_flags().values() if flag.kind in ("json", "levels")]
    return {name for flag in flags for name in (flag.option, *tables.SHORT_NAMES.get(flag.name, ()))}


def _nested(keys: Sequence[str], text: str) -> object:
    """{key: {key: value}}; a last key with + holds a list."""
    if not keys:
        return _value(text)
    key = keys[0].replace("-", "_")
    if len(keys) == 1 and key.endswith("+"):
        return {key[:-1]: [_value(part) for part in text.split(",")]}
    return {key: _nested(keys[1:], text)}


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
