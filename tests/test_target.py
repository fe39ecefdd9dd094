"""How many cores a server takes: what it may run on, and no more than its control group allows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from zoo import checkpoint

from fuseline import _C
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import Target, detect_target, usable_cpus

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
