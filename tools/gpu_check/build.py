"""Builds the native libraries with this machine's compilers, and links the sources into an importable package.

python build.py TARGET [WHEELS]     -> TARGET/pkg/fuseline, TARGET/wheels
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def main(target: Path, wheels: Path | None = None) -> None:
    if wheels is not None:
        install(target / "wheels", sorted(wheels.glob("*.whl")))
    package = target / "pkg" / "fuseline"
    package.mkdir(parents=True, exist_ok=True)
    build = ["build_ext", "--build-temp", str(target / "temp"), "--build-lib", str(target / "lib")]
    subprocess.run([sys.executable, "setup.py", *build], cwd=ROOT, check=True)
    for library in (target / "lib" / "fuseline").glob("_*.so"):
        link(package / library.name, library)
    link(package / "__init__.py", ROOT / "csrc" / "pkg" / "__init__.py")
    for folder in ("api", "compile", "engine"):
        link(package / folder, ROOT / folder)


def install(target: Path, wheels: list[Path]) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target"]
    subprocess.run([*command, str(target), *map(str, wheels)], check=True)


def link(place: Path, source: Path) -> None:
    place.unlink(missing_ok=True)
    place.symlink_to(source)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
