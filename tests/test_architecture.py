"""The house rules of docs/ARCHITECTURE.md that a program can check."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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


ENGINE_FOLDERS = {"state": set(), "memory": {"state"}, "schedule": {"state", "memory"}, "run": {"state", "memory"}}
"""Folders of the engine that each may import from, itself apart; all may import files of the engine that have no folder
below them: configuration, messages and the parameters of requests, which are parts of messages."""
ENGINE_FILES = {"config", "messages", "params"}


@pytest.mark.parametrize("folder", ENGINE_FOLDERS)
def test_folders_of_the_engine_import_downwards(folder: str) -> None:
    for path in (ROOT / "engine" / folder).rglob("*.py"):
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[:2] == ["fuseline", "engine"] and len(parts) > 2:
                allowed = ENGINE_FOLDERS[folder] | ENGINE_FILES | {folder}
                assert parts[2] in allowed, f"{path.relative_to(ROOT)} imports {module}"


COMPILE_ORDER = (
    "config", "load_format", "mistral_params", "stored_config", "overrides", "target", "memory", "specs",
    "graph_inputs", "cache", "ops", "formats", "gguf", "quantization", "kernels", "graph", "passes", "capture",
    "checkpoint_writer", "model_info", "residency", "tuning", "backends", "check", "compiler", "report",
)  # fmt: skip
"""Files and folders of compile/, each of which imports only itself and earlier ones: no circle between folders."""


def test_folders_of_the_compiler_import_downwards() -> None:
    for path in (ROOT / "compile").rglob("*.py"):
        own = path.relative_to(ROOT / "compile").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in COMPILE_ORDER, f"compile/{own} has no place in COMPILE_ORDER"
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[:2] == ["fuseline", "compile"] and len(parts) > 2 and parts[2] in COMPILE_ORDER:
                is_down = COMPILE_ORDER.index(parts[2]) <= COMPILE_ORDER.index(own)
                assert is_down, f"{path.relative_to(ROOT)} imports {module}"
@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_who_runs_ops_keeps_no_list_of_them(path: Path) -> None:
    """Facts of an op stand on its declaration; passes, capture and formats make ops, kernels compute them."""
    parts = path.relative_to(ROOT).parts
    if parts[0] != "compile" or parts[1] in ("ops", "kernels", "formats", "passes", "capture"):
        return
    assert "torch.ops.fuseline." not in path.read_text() and "OPS." not in path.read_text()


@pytest.mark.parametrize("folder", ["tools", "tests/helpers", "benchmarks", "csrc/cuda"])
def test_no_module_on_the_path_hides_a_public_package(folder: str) -> None:
    """Nor one that is not installed: Transformers imports `kernels` wherever it finds one."""
    transformers = Path(importlib.util.find_spec("transformers").origin).parent
    asked = re.findall(r'_is_package_available\("(\w+)"', (transformers / "utils" / "import_utils.py").read_text())
    public = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys() | set(asked)
    assert "kernels" in public and "torch" in public
    ours = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert ours & public == set()
