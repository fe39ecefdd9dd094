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
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import nvcc as toolkit  # noqa: E402

FOLDERS = ("engine", "compile", "api")


class CMakeBuild(build_ext):
    """Builds the native module with CMake and ninja, and the CUDA kernels with nvcc if a GPU can run them."""

    def build_extension(self, ext: Extension) -> None:
        import torch

        nvcc = toolkit.find_nvcc()
        wants_cuda = toolkit.is_wanted(os.environ.get("FUSELINE_CUDA", ""), torch.version.cuda, nvcc)
        build = Path(self.build_temp).resolve() / "cmake"
        built = build / "out"
        # The build environment has cmake and ninja beside its python, which need not be on PATH.
        env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-GNinja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DTORCH_DIR={Path(torch.__file__).parent}", f"-DOUT_DIR={built}", f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.check_call(configure, env=env)
        subprocess.check_call(["cmake", "--build", str(build), "-j", jobs], env=env)
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        install(next(built.glob("_C.*")), module)
        library = built / "_cuda.so"
        if wants_cuda:
            archs = toolkit.known_archs(nvcc, gpu_archs()) or toolkit.known_archs(nvcc)
            toolkit.build(nvcc, library, archs, build.parent / "cuda", int(jobs))
            install(library, module.with_name(library.name))
        else:
            module.with_name(library.name).unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        """In an editable install setuptools copies only the module it knows; this copies the library too."""
        super().copy_extensions_to_source()
        library = Path(self.build_lib).resolve() / "fuseline" / "_cuda.so"
        target = ROOT / "csrc" / "pkg" / library.name
        if library.exists():
            install(library, target)
        else:
            target.unlink(missing_ok=True)


def gpu_archs() -> list[str]:
    """Compute capabilities of this machine's GPUs; building for these alone takes a third of the time."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = {torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count())}
    return [f"{major}{minor}{'a' if major == 9 else ''}" for major, minor in sorted(found)]


def install(built: Path, target: Path) -> None:
    """Replaces the library atomically: running processes keep the old one, and none sees a partial file."""
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
