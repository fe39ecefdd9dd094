"""The machine description and small sizes that tests of kernel benchmarks use."""

from __future__ import annotations

import pytest

from fuseline.api.bench import kernels
from fuseline.api.bench.kernels import Machine

MACHINE = Machine("avx2", 1, bandwidth=1e9, flops=1e10)


@pytest.fixture
def small(monkeypatch) -> None:
    """A small model on a machine that is not measured."""
    monkeypatch.setattr(kernels, "SHAPES", {"135m": (64, 96, 4, 2, 16, 128), "0.5b": (32, 96, 2, 1, 16, 128)})
    monkeypatch.setattr(kernels, "measure_machine", lambda dtype, threads: MACHINE)
