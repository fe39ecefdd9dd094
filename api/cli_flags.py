"""Flags derived from the configuration dataclasses: name, type, default and help of every field."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import types
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from typing import Literal, Union, get_args, get_origin, get_type_hints

from fuseline.api import cli_tables as tables
from fuseline.api.config import ConfigError, JsonObject, ServerConfig
from fuseline.api.config_levels import check_levels
from fuseline.compile.config import CompileConfig
from fuseline.engine.config import CacheConfig, EngineConfig, GrammarConfig, SchedulerConfig

CONFIGS = (ServerConfig, EngineConfig, CacheConfig, SchedulerConfig, GrammarConfig, CompileConfig)
"""Outer first: of fields with one name the outermost gives default and help, and one flag sets them all."""
SUFFIXES = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}


@dataclass(frozen=True)
class Flag:
    """One flag. `kind` is one of bool, bool-value, int, float, str, many, json-list, json, levels."""

    name: str
    kind: str
    default: object
    help: str
    choices: tuple[object, ...] = ()

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


@cache
def field_docs(config: type) -> dict[str, str]:
    """The string under each field of a dataclass."""
    body = ast.parse(inspect.getsource(config)).body[0].body
    docs: dict[str, str] = {}
    for statement, following in zip(body, body[1:], strict=False):
        text = following.value if isinstance(following, ast.Expr) else None
        if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Constant):
            docs[statement.target.id] = " ".join(str(text.value).split())
    return docs


@cache
def config_flags() -> dict[str, Flag]:
    """Flags of all dataclass fields, by field name."""
    flags: dict[str, Flag] = {}
    docs = {name: text for config in reversed(CONFIGS) for name, text in field_docs(config).items()}
    for config in CONFIGS:
        hints = get_type_hints(config)
        for item in fields(config):
            if item.name not in tables.NOT_FLAGS and item.name not in flags:
                flags[item.name] = _flag(item, hints[item.name], docs.get(item.name, ""))
    return flags


def recorded_flags() -> dict[str, Flag]:
    """Flags that only validate."""
    return {
        name: Flag(name, _kind(name, type(row.default)), row.default, f"No effect here: {row.note}.", row.choices)
        for name, row in tables.RECORDED.items()
    }


def _flag(item: Field, hint: object, help_text: str) -> Flag:
    default = () if item.default is MISSING else item.default
    choices = tables.CHOICES.get(item.name, ())
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        hint = type(choices[0])
    return Flag(item.name, _kind(item.name, hint), default, help_text, choices)


def _kind(name: str, hint: object) -> str:
    if name == "compilation_config":
        return "levels"
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if hint is bool:
        return "bool-value" if name in tables.BOOL_VALUES else "bool"
    if hint in (int, float, str):
        return hint.__name__
    if hint is tuple or hint == JsonObject:
        return "json"
    return "json-list" if name in tables.JSON_LISTS else "many"


def add_flags(parser: argparse.ArgumentParser, groups: Iterable[str]) -> None:
    """Add the flags of the help groups, the recorded ones and, hidden, those of later parts."""
    flags = config_flags()
    for title in groups:
        group = parser.add_argument_group(title)
        for name in tables.GROUPS[title]:
            _add(group, flags[name])
    group = parser.add_argument_group("accepted without effect on this device")
    for flag in recorded_flags().values():
        _add(group, flag)
    for name, later in tables.LATER.items():
        _add_later(parser, name, later)


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    names = [*tables.SHORT_NAMES.get(flag.name, ()), flag.option]
    common: dict = {"dest": flag.name, "default": argparse.SUPPRESS, "help": help_line(flag)}
    if flag.kind == "bool":
        _add_switch(group, flag, names, common)
    elif flag.kind == "bool-value":
        group.add_argument(*names, nargs="?", const=True, type=bool_value, metavar="true|false", **common)
        group.add_argument(f"--no-{flag.option[2:]}", dest=flag.name, action="store_false", **_hidden())
    elif flag.kind == "many":
        repeat = {"action": "append"} if flag.name in tables.REPEATABLE else {"action": "extend", "nargs": "+"}
        group.add_argument(*names, **repeat, metavar="X", **common)
    else:
        choices = {"choices": flag.choices} if flag.choices else {"metavar": METAVARS[flag.kind]}
        group.add_argument(*names, type=converter(flag), **choices, **common)


def _add_switch(group: argparse._ArgumentGroup, flag: Flag, names: list[str], common: dict) -> None:
    """--x and --no-x; help shows the second only where the default is on."""
    if flag.default:
        group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        return
    group.add_argument(*names, action="store_true", **common)
    group.add_argument(f"--no-{flag.option[2:]}", dest=flag.name, action="store_false", **_hidden())


def _add_later(parser: argparse.ArgumentParser, name: str, later: tables.Later) -> None:
    names = [*tables.SHORT_NAMES.get(name, ()), "--" + name.replace("_", "-")]
    if later.is_switch:
        parser.add_argument(*names, dest=name, action=argparse.BooleanOptionalAction, **_hidden())
    else:
        parser.add_argument(*names, dest=name, nargs="+" if later.takes_many else None, **_hidden())


def _hidden() -> dict:
    return {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}


def help_line(flag: Flag) -> str:
    """Help with the default, safe for argparse's % formatting."""
    default = flag.default
    if flag.kind in ("json", "levels"):
        default = dict(default) if default else ""
        default = default.get("level", json.dumps(default)) if default else ""
    if flag.kind in ("many", "json-list"):
        default = json.dumps(list(default)) if default else ""
    shown = "" if default in ("", None, False, ()) else f" (default: {default})"
    return (flag.help + shown).replace("%", "%%")


def converter(flag: Flag) -> Callable[[str], object]:
    """Return the function that parses one value's text; it raises ArgumentTypeError."""
    if flag.kind == "int" and flag.name in tables.HUMAN_INTS:
        return human_int
    kinds = {"int": int, "float": float, "str": text_or_unset, "json": json_object, "json-list": json_list}
    return {**kinds, "levels": compilation_config}[flag.kind]


METAVARS = {"int": "N", "float": "X", "str": "TEXT", "json": "JSON", "json-list": "JSON", "levels": "LEVEL|JSON"}


def text_or_unset(text: str) -> str:
    return "" if text == "None" else text


def bool_value(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def human_int(text: str) -> int:
    """8192, 8k (8000), 8K (8192), 1.5M, ..."""
    factor = SUFFIXES.get(text[-1:], 1)
    try:
        return int(float(text[:-1]) * factor) if factor > 1 else int(text)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number (8192, 8k, 8K, 1M)") from error


def json_object(text: str) -> JsonObject:
    value = _json(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return tuple(value.items())


def json_list(text: str) -> tuple[str, ...]:
    value = _json(text)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON list of strings")
    return tuple(value)


def compilation_config(text: str) -> JsonObject:
    """A level, or a JSON object with known keys; the level comes first in the result."""
    value = _json(text)
    if isinstance(value, int):
        value = {"level": value}
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a level (0 to 3) nor a JSON object")
    levels = {"level": 2, **value}
    try:
        check_levels(levels)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("compilation_config: ")) from error
    return tuple(levels.items())


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no valid JSON: {error}") from error
