"""Writes constraints.txt: the exact versions that `make serve` and `make test` install (`make constraints`).

uv resolves the newest versions that pyproject.toml allows, for all supported Python versions and platforms at once.
torch keeps its range, because its builds differ between machines; so does triton. The pins of torch's CUDA builds
(nvidia-*, cuda-*) are left to torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BY_RANGE = ("torch", "triton")
LEFT_TO_TORCH = ("nvidia-", "cuda-")
HEADER = "# Exact versions for make serve and make test; made by `make constraints` from the ranges in pyproject.toml."


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = requirements(project)
    lines = constraints(wanted, resolve(wanted, project["project"]["requires-python"].lstrip(">=")))
    (ROOT / "constraints.txt").write_text("\n".join([HEADER, *lines]) + "\n")
    print(f"constraints.txt: {len(lines)} packages")
    return 0


def requirements(project: dict) -> list[str]:
    """Requirements of the build, the server and all extras."""
    extras = project["project"]["optional-dependencies"].values()
    return [
        *project["build-system"]["requires"], *project["project"]["dependencies"],
        *(requirement for extra in extras for requirement in extra),
    ]  # fmt: skip


def resolve(wanted: Iterable[str], python: str) -> list[str]:
    """One `name==version ; marker` per package. Raises CalledProcessError if there is no solution."""
    command = [
        sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--universal", "--fork-strategy", "fewest",
        "--python-version", python, "--no-annotate", "--no-header",
    ]  # fmt: skip
    found = subprocess.run(command, input="\n".join(wanted), text=True, stdout=subprocess.PIPE, check=True)
    return found.stdout.splitlines()


def constraints(wanted: Iterable[str], resolved: Iterable[str]) -> list[str]:
    """The pins, sorted by name, with ranges for the packages of BY_RANGE."""
    ranges = {name_of(requirement): requirement for requirement in wanted if name_of(requirement) in BY_RANGE}
    pins = {line: name_of(line) for line in resolved if name_of(line) not in BY_RANGE}
    kept = [line for line, name in pins.items() if not name.startswith(LEFT_TO_TORCH)]
    return sorted([*kept, *ranges.values()], key=name_of)


def name_of(requirement: str) -> str:
    """Normalized name of the package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


if __name__ == "__main__":
    sys.exit(main())
