"""docs/TOOLS.md lists the formats that there are."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from fuseline.api.parsers.registry import reasoning_parser_names, tool_parser_names

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))


def test_the_tables_are_up_to_date() -> None:
    import make_tool_docs

    text = make_tool_docs.TARGET.read_text()
    assert make_tool_docs.make_text(text) == text, "run tools/make_tool_docs.py"
    names = {name for row in re.findall(r"^\| ([^|]*) \|", text, re.M) for name in re.findall(r"`([\w-]+)`", row)}
    assert {*tool_parser_names(), *reasoning_parser_names()} <= names
