"""Maps the top-level folders to the package `fuseline` and drives CMake for the native library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
FOLDERS = ("engine", "compile", "api")


class CMakeBuild(build_ext):
    """Configure and build the one native module with CMake and ninja."""

    def build_extension(self, ext: Extension) -> None:
        import torch

        if os.environ.get("FUSELINE_CUDA") == "1":
            sys.exit("FUSELINE_CUDA=1: this version has no CUDA kernels; unset it to build the CPU kernels")

        build = Path(self.build_temp).resolve() / "cmake"
        built = build / "out"
        # The environment that builds has cmake and ninja beside its python, on PATH or not.
        env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-GNinja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DTORCH_DIR={Path(torch.__file__).parent}", f"-DOUT_DIR={built}", f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.check_call(configure, env=env)
        subprocess.check_call(["cmake", "--build", str(build), "-j", jobs], env=env)
        install(next(built.glob("_C.*")), Path(self.get_ext_fullpath(ext.name)).resolve())


def install(built: Path, target: Path) -> None:
    """Put the library in place in one step: processes that run the old one keep it, none sees half of a new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.copy2(built, part)
    os.replace(part, target)


packages, package_dir = ["fuseline"], {"fuseline": "csrc/pkg"}
for folder in FOLDERS:
    package_dir[f"fuseline.{folder}"] = folder
    packages += [f"fuseline.{folder}", *(f"fuseline.{folder}.{name}" for name in find_packages(folder))]

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"fuseline": ["demo/*"], "fuseline.api": ["web/*"]},
    ext_modules=[Extension("fuseline._C", [])] if (ROOT / "CMakeLists.txt").exists() else [],
    cmdclass={"build_ext": CMakeBuild},
)
