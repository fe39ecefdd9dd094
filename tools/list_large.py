"""Lists large files, large functions, and functions with many parameters: a hint where to look, not a limit.

    python tools/list_large.py
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("api", "engine", "compile", "csrc", "benchmarks", "tools", "tests")
SOURCES = (".py", ".cpp", ".cu", ".h", ".cuh", ".js")
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 400, 80, 7
"""Lines of a file, lines of a function, parameters besides self."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> int:
    found = [line for folder in FOLDERS for line in large(ROOT / folder)]
    heading = f"files over {MAX_FILE} lines, functions over {MAX_FUNCTION}, more than {MAX_PARAMETERS} parameters"
    print("\n".join([f"{len(found)} to look at ({heading}):" if found else f"no {heading}", *found]))
    return 0


def large(folder: Path) -> Iterator[str]:
    """One line per finding, sorted by file."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SOURCES and path.is_file()):
        text, name = path.read_text(), path.relative_to(folder.parent)
        num_lines = len(text.splitlines())
        if num_lines > MAX_FILE:
            yield f"{name}: {num_lines} lines"
        if path.suffix == ".py":
            yield from (f"{name}:{line}" for line in large_functions(text))


def large_functions(text: str) -> Iterator[str]:
    """`line: name, finding` for each function of a Python file, nested functions included."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, Function):
            continue
        num_lines, num_parameters = node.end_lineno - node.lineno + 1, count_parameters(node.args)
        if num_lines > MAX_FUNCTION:
            yield f"{node.lineno}: {node.name}, {num_lines} lines"
        if num_parameters > MAX_PARAMETERS:
            yield f"{node.lineno}: {node.name}, {num_parameters} parameters"


def count_parameters(arguments: ast.arguments) -> int:
    """Number of parameters of all kinds, without a method's first."""
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return sum(item is not None and item.arg not in ("self", "cls") for item in named)


if __name__ == "__main__":
    sys.exit(main())
