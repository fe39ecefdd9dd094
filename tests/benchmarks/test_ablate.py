"""benchmarks/ablate.py: a row for every pass and level, and honest ratios."""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from zoo import checkpoint

from fuseline.compile.config import NEEDED_PASSES, PASSES

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "ablate.py"


@pytest.fixture(scope="module")
def ablate() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_ratios_compare_turn_by_turn(ablate) -> None:
    fast, slow = (ablate.in_turns([lambda: time.sleep(0.002), lambda: time.sleep(0.006)], 0.1))
    assert len(fast) == len(slow) > 2 and min(slow) > 1.5 * min(fast)
    assert [len(found) for found in ablate.in_turns([lambda: time.sleep(0.01)], 0.0)] == [1]


@pytest.mark.slow
def test_every_pass_and_level_has_a_row(ablate, tmp_path) -> None:
    rows = list(ablate.measure(str(checkpoint("llama", "bfloat16")), 20, 1, 0.02, str(tmp_path)))
    optional = [f"without {name}" for name in PASSES if name not in NEEDED_PASSES]
    assert [row.name for row in rows] == ["all on", *optional, "-O2", "-O1", "-O0"]
    assert all(min(row.prefill, row.prefill_ratio, row.decode, row.decode_ratio) > 0 for row in rows)
    assert {row.name for row in rows if row.matches} >= {"without find_norm", "without join_linears"}
