"""Writes the tables of docs/TOOLS.md from the declared formats.

python tools/make_tool_docs.py            writes the file
python tools/make_tool_docs.py --check    exit status 1 when it is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fuseline.api.parsers import formats, reasoning
from fuseline.api.parsers.registry import HARMONY_REASONING, HARMONY_TOOLS, TEMPLATE

TARGET = Path(__file__).resolve().parent.parent / "docs" / "TOOLS.md"
BEGIN, END = "<!-- tables: tools/make_tool_docs.py -->\n", "<!-- end -->\n"


def make_text(text: str) -> str:
    """The page with its tables renewed."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + tables() + END + tail


def tables() -> str:
    rows = [(form.names, _begin(form)) for form in formats.FORMATS]
    rows += [
        (HARMONY_TOOLS, _code("<|channel|>commentary to=functions.NAME")),
        ((TEMPLATE,), "as the template says"),
    ]
    head = ["| `--tool-call-parser` | calls begin with |", "|---|---|"]
    lines = [*head, *(_row(*row) for row in rows), ""]
    rows = [(form.names, " ".join(map(_code, (*form.begins, *form.ends)))) for form in reasoning.FORMATS]
    rows.append((HARMONY_REASONING, _code("<|channel|>analysis")))
    lines += ["| `--reasoning-parser` | reasoning stands between |", "|---|---|", *(_row(*row) for row in rows), ""]
    return "\n".join(lines)


def _begin(form: formats.ToolFormat) -> str:
    marks = [_code(mark) for mark in (*form.groups, *form.opens)]
    return ", ".join(([" ".join(marks)] if marks else []) + [f"a first `{letter}`" for letter in form.bare])


def _row(names: tuple[str, ...], *cells: str) -> str:
    return f"| {', '.join(f'`{name}`' for name in names)} | {' | '.join(cells)} |"


def _code(mark: str) -> str:
    text = mark.replace("|", "\\|").replace("\n", "")
    return f"```` {text} ````" if "`" in text else f"`{text}`"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    old = TARGET.read_text()
    new = make_text(old)
    if parser.parse_args().check:
        return int(new != old)
    TARGET.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
