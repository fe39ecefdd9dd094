"""Flags derived from the configuration dataclasses: name, type, default and help of every field."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import types
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import cache, partial
from typing import Literal, Union, get_args, get_origin, get_type_hints

from fuseline.api import cli_tables as tables
from fuseline.api.config import ConfigError, JsonObject, ServerConfig
from fuseline.api.config_levels import check_levels, explicit_levels
from fuseline.api.flag_rows import ALIASES
from fuseline.compile.config import CompileConfig
from fuseline.compile.overrides import merged
from fuseline.engine.config import CacheConfig, EngineConfig, GrammarConfig, SchedulerConfig

CONFIGS = (ServerConfig, EngineConfig, CacheConfig, SchedulerConfig, GrammarConfig, CompileConfig)
"""Outer first: of fields with one name the outermost gives default and help, and one flag sets them all."""
SUFFIXES = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30, "t": 10**12, "T": 2**40}


@dataclass(frozen=True)
class Flag:
    """One flag. `kind` is one of bool, bool-value, int, float, str, many, json-list, json, levels, pairs, floats."""

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


@cache
def row_flags() -> dict[str, Flag]:
    """Flags that no field stands for."""
    words = {"ignored": "No effect here: {}.", "unimplemented": "Not yet ({}).", "refused": "Refused: {}."}
    made = {
        name: Flag(name, row.kind, row.default, words[row.fate].format(row.note), row.choices)
        for name, row in tables.ROWS.items()
    }
    return made | {name: replace(made[name], help=f"Also: {row.note}.") for name, row in ALIASES.items()}


@cache
def all_flags() -> dict[str, Flag]:
    """Every flag by its name with underscores."""
    return {**row_flags(), **config_flags()}


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
    """Add the flags of the help groups and, not shown by --help, those without a field."""
    flags = config_flags()
    for title in groups:
        group = parser.add_argument_group(title)
        for name in tables.GROUPS[title]:
            _add(group, flags[name])
    for flag in row_flags().values():
        _add(parser, flag, is_hidden=flag.name not in ALIASES)


def _add(group: argparse._ActionsContainer, flag: Flag, is_hidden: bool = False) -> None:
    names = [*tables.SHORT_NAMES.get(flag.name, ()), flag.option]
    common: dict = {"dest": flag.name, **_hidden()}
    if not is_hidden:
        common["help"] = help_line(flag)
    if flag.kind == "bool":
        _add_switch(group, flag, names, common)
    elif flag.kind == "bool-value":
        group.add_argument(*names, nargs="?", const=True, type=bool_value, metavar="true|false", **common)
        group.add_argument(f"--no-{flag.option[2:]}", dest=flag.name, action="store_false", **_hidden())
    elif flag.kind == "many":
        repeat = {"action": "append"} if flag.name in tables.REPEATABLE else {"action": "extend", "nargs": "+"}
        group.add_argument(*names, **repeat, metavar="X", **common)
    else:
        action = {"action": MergeObjects} if flag.kind in ("json", "levels") else {}
        metavar = "|".join(map(str, flag.choices)) or METAVARS[flag.kind]
        group.add_argument(*names, type=converter(flag), metavar=metavar, **action, **common)


class MergeObjects(argparse.Action):
    """A JSON object given in several parts (-O3 -O.backend=eager) is one; later keys win."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # noqa: ANN001 (argparse's own)
        found = dict(getattr(namespace, self.dest, None) or ())
        setattr(namespace, self.dest, tuple(merged(found, dict(values)).items()))


def _add_switch(group: argparse._ActionsContainer, flag: Flag, names: list[str], common: dict) -> None:
    """--x and --no-x; help shows the second only where the default is on."""
    if flag.default:
        group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        return
    group.add_argument(*names, action="store_true", **common)
    group.add_argument(f"--no-{flag.option[2:]}", dest=flag.name, action="store_false", **_hidden())


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
    parse = CONVERTERS[flag.kind]
    if flag.name in tables.HUMAN_INTS:
        parse = context_length if flag.name == "max_model_len" else human_int
    return partial(_chosen, parse, flag.choices) if flag.choices else parse


def _chosen(parse: Callable[[str], object], choices: tuple[object, ...], text: str) -> object:
    value = parse(text)
    if value not in choices and not (value == "" and isinstance(choices[0], str)):
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(map(str, choices))})")
    return value


METAVARS = {
    "int": "N", "float": "X", "str": "TEXT", "json": "JSON", "json-list": "JSON", "levels": "LEVEL|JSON",
    "pairs": "K=N,...", "floats": "X,...",
}  # fmt: skip


def number(kind: Callable[[str], object], text: str) -> object:
    try:
        return kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no {NUMBERS[kind]}") from error


NUMBERS = {int: "whole number", float: "number"}


def text_or_unset(text: str) -> str:
    return "" if text == "None" else text


def bool_value(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def context_length(text: str) -> int:
    """As human_int; auto and -1 are the longest context that fits."""
    return -1 if text.strip().lower() in ("auto", "-1") else human_int(text)


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


def pairs(text: str) -> JsonObject:
    """image=2,video=1, or the same as a JSON object."""
    if text.lstrip().startswith("{"):
        return json_object(text)
    found: dict[str, object] = {}
    for part in filter(None, text.split(",")):
        name, separator, count = part.partition("=")
        if not separator or not count.strip().isdigit():
            raise argparse.ArgumentTypeError(f"{part!r} is no NAME=N")
        if found.setdefault(name.strip(), int(count)) != int(count):
            raise argparse.ArgumentTypeError(f"{name.strip()} is given twice, with different numbers")
    return tuple(found.items())


def floats(text: str) -> tuple[float, ...]:
    return tuple(float(number(float, part)) for part in text_or_unset(text).split(",") if part)


def json_list(text: str) -> tuple[str, ...]:
    value = _json(text)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON list of strings")
    return tuple(value)


def compilation_config(text: str) -> JsonObject:
    """A level, or a JSON object with known keys."""
    value = _json(text)
    if isinstance(value, int):
        value = {"level": value}
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a level (0 to 3) nor a JSON object")
    try:
        check_levels(explicit_levels(value))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("compilation_config: ")) from error
    return tuple(value.items())


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no valid JSON: {error}") from error


CONVERTERS: dict[str, Callable[[str], object]] = {
    "int": partial(number, int), "float": partial(number, float), "str": text_or_unset, "json": json_object,
    "json-list": json_list, "levels": compilation_config, "pairs": pairs, "floats": floats, "bool": bool_value,
    "bool-value": bool_value, "many": json_list,
}  # fmt: skip
