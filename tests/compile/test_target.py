"""Which device there is, and how many cores a server takes: no more than its control group allows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from python_process import run_python
from zoo import checkpoint

from fuseline import _C
from fuseline.compile import target as targets
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import DeviceError, Target, detect_target, likely_kind, usable_cpus

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("max 100000", CORES),
        ("50000 100000", 1),
        ("100001 100000", min(2, CORES)),
        ("9900000 100000", CORES),
        ("", CORES),
    ],
)
def test_quota_of_the_control_group_is_kept(text: str, expected: int, tmp_path: Path) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert usable_cpus(file) == expected


def test_no_control_group_leaves_the_affinity(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path / "absent") == CORES


def test_threads_asked_for_are_the_ones_that_compute() -> None:
    assert detect_target(7).num_threads == 7
    before = _C.num_threads()
    try:
        compile_model(CompileConfig(model=str(checkpoint("llama", "float32"))), Target("cpu", _C.cpu_isa(), 3))
        assert _C.num_threads() == 3
    finally:
        _C.set_num_threads(before)


@pytest.fixture
def torch_of(tmp_path: Path, monkeypatch):
    """Makes it look as if another torch were installed, and a driver there or not."""

    def pretend(version: str, has_driver: bool) -> None:
        (tmp_path / "version.py").write_text(version)
        origin = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
        monkeypatch.setattr(targets, "find_spec", lambda name: origin)

        def load(name: str) -> None:
            if not has_driver:
                raise OSError(f"{name}: cannot open shared object file")

        monkeypatch.setattr(targets.ctypes, "CDLL", load)

    return pretend


CPU_BUILD = "__version__ = '9.1+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"
CUDA_BUILD = "__version__ = '9.1+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"


@pytest.mark.parametrize(
    ("version", "has_driver", "kind", "reason"),
    [
        (CPU_BUILD, True, "cpu", "torch 9.1.cpu is built without CUDA"),
        (CUDA_BUILD, False, "cpu", "no GPU, or no driver for it"),
        (CUDA_BUILD, True, "cuda", ""),
    ],
)
def test_the_kind_of_device_is_told_by_files(torch_of, version: str, has_driver: bool, kind: str, reason: str) -> None:
    torch_of(version, has_driver)
    assert likely_kind("auto") == kind and likely_kind("cpu") == "cpu"
    if reason:
        with pytest.raises(DeviceError, match=f"^--device cuda: {reason}. Available devices: cpu.$"):
            likely_kind("cuda")
    else:
        assert likely_kind("cuda") == "cuda"


def test_telling_the_kind_imports_no_torch() -> None:
    code = "import sys; from fuseline.compile.target import likely_kind as f; f('auto'); print('torch' in sys.modules)"
    assert run_python(code) == "False"
