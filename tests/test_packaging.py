"""Dependencies are declared, bounded by what was tested, and pinned for `make serve` and `make test`."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import make_constraints  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
DECLARED = [Requirement(text) for text in make_constraints.requirements(PROJECT)]
_, *PINNED = (ROOT / "constraints.txt").read_text().splitlines()
PINS = {canonicalize_name(pin.name): pin for pin in map(Requirement, PINNED)}
BY_RANGE = set(make_constraints.BY_RANGE)
OPTIONAL = {"flash_attn", "flash_attn_interface", "flashinfer", "triton"}
"""Used where they are installed; torch's CUDA builds bring triton."""


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_every_dependency_has_both_bounds(requirement: Requirement) -> None:
    operators = {item.operator for item in requirement.specifier}
    assert operators & {">=", "=="} and operators & {"<", "<=", "=="}


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_the_pin_of_a_dependency_lies_in_its_range(requirement: Requirement) -> None:
    pin = PINS[canonicalize_name(requirement.name)]
    if pin.name in BY_RANGE:
        assert pin.specifier == requirement.specifier
    else:
        assert requirement.specifier.contains(version_of(pin))


def test_all_but_torch_is_exact() -> None:
    assert {name for name, pin in PINS.items() if {item.operator for item in pin.specifier} != {"=="}} == BY_RANGE
    assert not [name for name in PINS if name.startswith(make_constraints.LEFT_TO_TORCH)]


def test_what_dependencies_need_is_pinned_too() -> None:
    """Every package that is reached from the project's requirements, by what is installed here."""
    needed = set(reached(DECLARED))
    assert len(needed) > len(DECLARED)
    left = {name for name in needed - PINS.keys() if not name.startswith(make_constraints.LEFT_TO_TORCH)}
    assert not left, "run make constraints"


def reached(requirements: list[Requirement]) -> Iterator[str]:
    """Normalized names of installed packages, without those that extras of dependencies would bring."""
    seen: set[str] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            waiting += map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed here: plot, or a tool of the build
        yield name


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("api", ["plot", "completion", "guidance", "tracing", "sentencepiece"]),
     ("engine", ["guidance", "outlines", "lm-format-enforcer"]),
     ("compile", ["tensorizer", "runai_streamer"]), ("csrc/pkg", []), ("benchmarks", ["bench"]),
     ("tools", ["bench", "test"]), ("tests", ["bench", "test"])],
)  # fmt: skip
def test_what_is_imported_is_declared(folder: str, extras: list[str]) -> None:
    texts = [*PROJECT["project"]["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    found = {module: paths for module, paths in imports(ROOT / folder).items() if module not in OPTIONAL}
    owners = metadata.packages_distributions()
    missing = {
        module: sorted(paths)
        for module, paths in found.items()
        if not declared & {canonicalize_name(owner) for owner in owners.get(module, [module])}
    }
    assert not missing


def imports(folder: Path) -> dict[str, set[str]]:
    """Modules that are neither Python's nor ours -> files that import them."""
    tops = ("tests", "tools", "benchmarks", "csrc")
    ours = {"fuseline"} | {path.stem for top in tops for path in modules(ROOT / top)}
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        for name in imported(ast.parse(path.read_text())):
            if name not in ours and name not in sys.stdlib_module_names:
                found.setdefault(name, set()).add(path.name)
    return found


def modules(folder: Path) -> list[Path]:
    """Files, and folders with files: what a script may import by its bare name."""
    files = list(folder.rglob("*.py"))
    return [*files, *{path.parent for path in files}]


def imported(tree: ast.AST) -> Iterator[str]:
    """Top names of the modules that are imported, at the top of a file or inside of a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_make_installs_exact_versions_and_what_benchmarks_need() -> None:
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if "$(BIN)/pip install" in line]
    project, newest = [line for line in lines if " -e " in line], [line for line in lines if "NEWEST" in line]
    assert len(project) == 2 and not newest
    assert all("-c constraints.txt" in line for line in lines if "uv" not in line)
    assert all(re.search(r'-e "\.\[bench[],]', line) for line in project)


def test_constraints_keep_ranges_of_torch_and_leave_its_own() -> None:
    wanted = ["A_b>=1", "torch>=2.11,<=2.13.0", "triton>=3.6,<3.8; platform_system == 'Linux'"]
    resolved = ["torch==2.13.0", "nvidia-nccl-cu13==2.29", "cuda-bindings==13.1", "triton==3.7", "c==3 ; x", "a-b==1.2"]
    assert make_constraints.constraints(wanted, resolved) == ["a-b==1.2", "c==3 ; x", *wanted[1:]]


def version_of(pin: Requirement) -> str:
    (item,) = pin.specifier
    return item.version
