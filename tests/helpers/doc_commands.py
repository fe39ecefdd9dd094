"""Commands as documents show them: in code blocks, in spans of code, in the docstrings of scripts."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md")), "benchmarks/RESULTS.md"]
DERIVED = "docs/FLAGS.md"
"""Made from the flags themselves, and lists those that are refused."""
PROGRAMS = ("fuseline", "make", "python", "python3", "pip", "gpu_check")
ASSIGNMENT = re.compile(r"\w+=\S*$")
OPTION, OTHER_WORDS, GAP = re.compile(r"\[(-[^\]]*)\]"), re.compile(r" \[\w[^\]]* [^\]]*\]"), re.compile(r"\s{3,}")


@dataclass(frozen=True)
class Command:
    """`words[0]` is a program, or a flag that is shown by itself."""

    source: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.source}: {shlex.join(self.words)}"


def all_commands() -> list[Command]:
    """Each once, in the order of the pages."""
    found = [command for page in PAGES if page != DERIVED for command in commands_of_page(page)]
    for folder in ("benchmarks", "tools", "api"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
            found += commands_of_text(str(path.relative_to(ROOT)), docstring)
    return list(dict.fromkeys(found))


def commands_of_page(page: str) -> Iterator[Command]:
    return commands_of_text(page, (ROOT / page).read_text())


def commands_of_text(source: str, text: str) -> Iterator[Command]:
    """Lines of code blocks, then spans of code."""
    text = re.sub(r"^```python.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in _lines(block)]
    lines += [line for line in _lines(prose) if line.startswith("    ")]
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)
    for line in (*lines, *spans):
        if words := words_of(line):
            yield Command(source, words)


def _lines(text: str) -> list[str]:
    return re.sub(r"\\\n\s*", " ", text).splitlines()


def words_of(line: str) -> tuple[str, ...]:
    """The command's words, or none where the line is no command; a wide gap begins a remark.

    An [--option VALUE] in brackets is taken too, other words in brackets are not.
    """
    line = GAP.split(line.strip().removeprefix("$ "))[0]
    line = OTHER_WORDS.sub("", OPTION.sub(r"\1", line))
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return ()
    while words and ASSIGNMENT.match(words[0]):
        words = words[1:]
    return tuple(words) if words and (words[0] in PROGRAMS or words[0].startswith(("--", "-O"))) else ()


def flags_of_script(path: Path) -> set[str]:
    """Flags that a script gives to argparse, read from its source."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    values = [arg.value for call in named for arg in call.args if isinstance(arg, ast.Constant)]
    return {value for value in values if str(value).startswith("-")} | {"--help", "-h"}
