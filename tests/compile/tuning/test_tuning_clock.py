"""Clocks and limits of a machine: one home for measurements, compile/tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline import _C
from fuseline.compile.tuning import clock as clocks
from fuseline.compile.tuning.clock import HostClock, times_in_turns
from fuseline.compile.tuning.limits import Limits, matrix_rate, measure_limits, memory_bandwidth

ROOT = Path(__file__).resolve().parents[3]


class FakeTime:
    """A call takes the next of `seconds`."""

    def __init__(self, seconds: list[float]) -> None:
        self.now, self.calls = 0.0, []
        self._seconds = iter(seconds)

    def perf_counter(self) -> float:
        return self.now

    def call(self, name: str = "") -> None:
        self.calls.append(name)
        self.now += next(self._seconds)


def fake_time(monkeypatch, *seconds: float) -> FakeTime:
    fake = FakeTime(list(seconds))
    monkeypatch.setattr(clocks, "time", fake)
    return fake


def test_the_host_clock_takes_the_shortest_after_its_warm_ups(monkeypatch) -> None:
    fake = fake_time(monkeypatch, 1.0, 1.0, 8.0, 4.0, 16.0)
    assert HostClock(repeats=3, warm_ups=2)(fake.call) == 4.0
    assert len(fake.calls) == 5


def test_calls_take_turns(monkeypatch) -> None:
    fake = fake_time(monkeypatch, 1.0, 2.0, 4.0, 8.0)
    assert times_in_turns([lambda: fake.call("a"), lambda: fake.call("b")], 2) == [[1.0, 4.0], [2.0, 8.0]]
    assert fake.calls == ["a", "b", "a", "b"]


@pytest.mark.parametrize(("max_seconds", "rounds"), [(0.0, 1), (2.5, 3), (100.0, 4)])
def test_no_round_begins_after_the_time_is_up(max_seconds: float, rounds: int, monkeypatch) -> None:
    fake = fake_time(monkeypatch, *[1.0] * 4)
    assert times_in_turns([fake.call], 4, max_seconds) == [[1.0] * rounds]


def test_a_clock_raises_what_the_call_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        HostClock()(lambda: 1 / 0)


def in_half_a_second(call: clocks.Call) -> float:
    call()
    return 0.5


@pytest.mark.parametrize(("device", "moved"), [("cpu", 1 << 12), ("meta", 2 << 12)])
def test_bandwidth_counts_what_is_moved(device: str, moved: int) -> None:
    """Read once on a CPU; read and written elsewhere."""
    assert memory_bandwidth(in_half_a_second, device, 1 << 12) == moved / 0.5


@pytest.mark.parametrize(
    ("device", "dtype", "isa", "factor"),
    [
        ("cpu", torch.float32, "avx512bf16", 1), ("cpu", torch.bfloat16, "avx512bf16", 2),
        ("cpu", torch.bfloat16, "avx2", 1), ("cpu", torch.float16, "avx512bf16", 1),
        ("meta", torch.bfloat16, "avx512bf16", 1),
    ],
)  # fmt: skip
def test_the_rate_is_of_the_dtype(device: str, dtype: torch.dtype, isa: str, factor: int, monkeypatch) -> None:
    monkeypatch.setattr(_C, "cpu_isa", lambda: isa)
    assert matrix_rate(in_half_a_second, device, dtype, 8) == factor * 2 * 8**3 / 0.5


def test_limits_of_this_machine() -> None:
    limits = measure_limits(HostClock(repeats=2), num_bytes=1 << 24, size=128)
    assert isinstance(limits, Limits) and limits.bandwidth > 1e8 and limits.matrix_rate > 1e8


def test_device_events_are_timed_in_one_place() -> None:
    folders = ("api", "engine", "compile", "benchmarks", "tools")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = [path for path in paths if "enable_timing" in path.read_text()]
    assert found == [ROOT / "compile" / "tuning" / "clock.py"]
