"""Compiles the CUDA kernels with nvcc into one shared object that needs neither torch nor a CUDA runtime library."""

from __future__ import annotations

import shutil
import site
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCES = sorted(FOLDER.glob("*.cu"))
ARCHS = ("80", "90a", "100")
FLAGS = (
    "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{FOLDER.parent}", f"-I{FOLDER.parent / 'include'}",
)  # fmt: skip


def find_nvcc() -> str | None:
    """Looks on PATH, in the toolkit's default folder, and in the wheels of CUDA 12 and 13."""
    packages = [Path(folder) / "nvidia" for folder in (*site.getsitepackages(), site.getusersitepackages())]
    places = [
        Path("/usr/local/cuda/bin"), *(folder / "cu13" / "bin" for folder in packages),
        *(folder / "cuda_nvcc" / "bin" for folder in packages),
    ]  # fmt: skip
    return shutil.which("nvcc") or next((str(p / "nvcc") for p in places if (p / "nvcc").is_file()), None)


def is_wanted(flag: str, torch_cuda: str | None, nvcc: str | None) -> bool:
    """Decides by $FUSELINE_CUDA, torch's CUDA version and nvcc. Exits with a message if a required build fails."""
    if flag not in ("", "0", "1"):
        raise SystemExit(f"FUSELINE_CUDA={flag}: 0, 1 or unset (built where torch is for CUDA and nvcc is installed)")
    if flag == "1" and nvcc is None:
        raise SystemExit("FUSELINE_CUDA=1: no nvcc on PATH, in /usr/local/cuda/bin or in the nvidia wheels; install the"
                         " CUDA toolkit, or unset FUSELINE_CUDA to build without CUDA C++ kernels")  # fmt: skip
    return flag == "1" or (flag == "" and torch_cuda is not None and nvcc is not None)


def known_archs(nvcc: str, archs: Sequence[str] = ARCHS) -> list[str]:
    """The architectures this nvcc supports; sm_100 came with CUDA 12.8."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in archs if f"sm_{arch.rstrip('a')}" in listed]


def compile_source(nvcc: str, source: Path, target: Path, archs: Sequence[str], flags: Sequence[str] = ()) -> str:
    """Compiles one object with machine code for `archs`, and PTX for newer GPUs. Returns nvcc's output.

    Raises RuntimeError with that output if it fails.
    """
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if not archs[-1].endswith("a"):
        code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    command = [nvcc, "-c", *FLAGS, *code, *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name}: {done.stdout[-4000:]}")
    return done.stdout


def build(nvcc: str, target: Path, archs: Sequence[str], work: Path, jobs: int) -> None:
    """Builds `target` from all sources, with objects in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    objects = [work / f"{source.stem}.o" for source in SOURCES]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda pair: compile_source(nvcc, *pair, archs), zip(SOURCES, objects, strict=True)))
    command = [nvcc, "-shared", "-cudart=static", *map(str, objects), "-o", str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"linking {target.name}: {done.stdout[-4000:]}")
