"""Builds the native libraries with this machine's compilers, and links the sources into an importable package.

python build.py TARGET [--wheels=DIR] [--prebuilt=DIR]     -> TARGET/pkg/fuseline, TARGET/wheels
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="build")
    parser.add_argument("target", type=Path)
    parser.add_argument("--wheels", type=Path, help="packages to install into TARGET/wheels")
    parser.add_argument("--prebuilt", type=Path, help="directory of libraries to use instead of building them")
    args = parser.parse_args()
    if args.wheels is not None:
        install(args.target / "wheels", sorted(args.wheels.glob("*.whl")))
    make_package(args.target / "pkg" / "fuseline", args.prebuilt or build(args.target))


def build(target: Path) -> Path:
    """Builds the libraries; returns their folder."""
    options = ["build_ext", "--build-temp", str(target / "temp"), "--build-lib", str(target / "lib")]
    subprocess.run([sys.executable, "setup.py", *options], cwd=ROOT, check=True)
    return target / "lib" / "fuseline"


def make_package(package: Path, libraries: Path) -> None:
    """Links the libraries and the sources. Raises RuntimeError for libraries that this Python cannot load."""
    package.mkdir(parents=True, exist_ok=True)
    for earlier in package.glob("_*.so"):
        earlier.unlink()
    for library in libraries.glob("_*.so"):
        link(package / library.name, library.resolve())
    for name in ("__init__.py", "demo"):
        link(package / name, ROOT / "csrc" / "pkg" / name)
    for folder in ("api", "compile", "engine"):
        link(package / folder, ROOT / folder)
    code = "import torch, fuseline._C"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=os.environ | {"PYTHONPATH": str(package.parent)})
    if done.returncode:
        raise RuntimeError(f"the libraries of {libraries} cannot be loaded by {sys.executable}")


def install(target: Path, wheels: list[Path]) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target"]
    subprocess.run([*command, str(target), *map(str, wheels)], check=True)


def link(place: Path, source: Path) -> None:
    place.unlink(missing_ok=True)
    place.symlink_to(source)


if __name__ == "__main__":
    main()
