"""Writes docs/FLAGS.md from the configuration dataclasses and the tables of the command line.

    python tools/make_flag_docs.py            writes the file
    python tools/make_flag_docs.py --check    exit status 1 when it is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fuseline.api import cli_tables as tables
from fuseline.api.cli_flags import METAVARS, Flag, config_flags, field_docs, help_line
from fuseline.api.config import Environment, variables_of
from fuseline.api.config_levels import KEYS
from fuseline.api.flag_rows import ALIASES, Fate

TARGET = Path(__file__).resolve().parent.parent / "docs" / "FLAGS.md"
HEAD = """# Flags of `fuseline serve`

Made from the configuration by `tools/make_flag_docs.py`; edit the text under the fields instead.

`_` and `-` are the same in names; `--name value` and `--name=value` are the same; keys of JSON flags can be given one
at a time (`-O.level=1`, `--hf-overrides.text_config.rope_theta 1e6`, `--x.list+ a,b`), and several parts of one JSON
flag are merged; the positional MODEL wins over `--model`. Precedence: command line > `--config` file > environment >
default. A bad value or an unknown flag ends with status 2, a combination that cannot run with status 1 and one line.
`--print-config` makes all checks of a start that need no weights and shows what was resolved.
"""


def make_text() -> str:
    flags = config_flags()
    parts = [HEAD]
    for title, names in tables.GROUPS.items():
        rows = [_row(flags[name]) for name in names]
        parts.append(_table(title.capitalize(), ("flag", "value", "meaning"), rows))
    parts.append(_level_keys())
    parts.append(_aliases())
    parts.append(_rows("ignored", "Accepted without effect on this device", ("why", "flags")))
    parts.append(_rows("unimplemented", "Not yet supported (refused in words)", ("part", "flags")))
    parts.append(_rows("refused", "Refused", ("cause and cure", "flags")))
    parts.append(_environment())
    return "\n".join(parts)


def _row(flag: Flag) -> tuple[str, str, str]:
    names = ", ".join(f"`{name}`" for name in (*tables.SHORT_NAMES.get(flag.name, ()), flag.option))
    return names, _value(flag), help_line(flag).replace("%%", "%")


def _value(flag: Flag) -> str:
    refused = tables.MISSING_DEVICES if flag.name == "device" else tables.LATER_CHOICES.get(flag.name, {})
    if flag.choices:
        return " ".join(str(choice) for choice in flag.choices if str(choice) not in refused)
    kinds = {"bool": "switch", "bool-value": "true or false", "many": "one or more"}
    return kinds.get(flag.kind) or METAVARS[flag.kind]


def _level_keys() -> str:
    rows = [(f"`{name}`", key.words, key.effect or "no effect on this device") for name, key in KEYS.items()]
    return _table("Keys of `--compilation-config`", ("key", "value", "meaning"), rows)


def _rows(fate: Fate, title: str, head: tuple[str, str]) -> str:
    """Flags without a field, by their note."""
    notes: dict[str, list[str]] = {}
    for name, row in tables.ROWS.items():
        if row.fate == fate and name not in ALIASES:
            names = [*tables.SHORT_NAMES.get(name, ()), "--" + name.replace("_", "-")]
            notes.setdefault(row.note, []).append(", ".join(f"`{option}`" for option in names))
    return _table(title, head, [(note, ", ".join(names)) for note, names in notes.items()])


def _aliases() -> str:
    rows = [(f"`--{name.replace('_', '-')}`", row.note) for name, row in ALIASES.items()]
    return _table("Other names", ("flag", "meaning"), rows)


def _environment() -> str:
    rows = [(f"`{variables_of(name)[0]}`", text) for name, text in field_docs(Environment).items()]
    return _table("Environment variables (also with the prefix VLLM_)", ("variable", "meaning"), rows)


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit status 1 when the file is out of date")
    is_check, text = parser.parse_args().check, make_text()
    if is_check:
        return 0 if TARGET.exists() and TARGET.read_text() == text else 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
