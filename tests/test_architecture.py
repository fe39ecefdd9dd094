"""The house rules of docs/ARCHITECTURE.md that a program can check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"api": 3, "engine": 2, "compile": 1}
FILES = sorted(path for folder in LAYERS for path in (ROOT / folder).rglob("*.py"))
ENV_READERS = {"compile/target.py", "api/config.py"}


def imported_modules(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "fuseline" and parts[1] in LAYERS else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for module in imported_modules(path):
        assert module.split(".")[0] not in LAYERS, f"bare import of {module}"
        target = layer_of(module)
        assert target is None or LAYERS[target] <= LAYERS[own], f"{own} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_environment_is_read_in_its_two_places(path: Path) -> None:
    if str(path.relative_to(ROOT)) in ENV_READERS:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in ("environ", "getenv"), f"reads the environment at line {node.lineno}"


def test_engine_knows_no_http() -> None:
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "api":
            continue
        for module in imported_modules(path):
            assert module.split(".")[0] not in ("pydantic", "fastapi", "uvicorn", "starlette"), f"{path}: {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_who_runs_ops_keeps_no_list_of_them(path: Path) -> None:
    """Facts of an op stand on its declaration; passes, capture and formats make ops, kernels compute them."""
    parts = path.relative_to(ROOT).parts
    if parts[0] != "compile" or parts[1] in ("ops", "kernels", "formats", "passes", "capture"):
        return
    assert "torch.ops.fuseline." not in path.read_text() and "OPS." not in path.read_text()
