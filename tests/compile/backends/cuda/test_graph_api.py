"""How graphs are captured with torch.cuda: on which streams, and what a capture that fails leaves behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import FakeCuda
from fake_gpu import FakeGraphs, HostSync

from fuseline.compile.backends.cuda.graph_api import CaptureStreams, CudaGraphApi
from fuseline.compile.kernels.registry import Implementation
from fuseline.compile.tuning import timer as timers
from fuseline.compile.tuning.recording import recording
from fuseline.compile.tuning.timer import Arguments, DeviceTimer

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def product() -> torch.Tensor:
    return F.linear(torch.ones(2, 3), torch.ones(4, 3))


def test_no_trial_writes_to_the_workspace_that_a_replayed_graph_writes_to(cuda) -> None:
    """Nor does a capture take one: it would stay in the pool."""
    api = CudaGraphApi(CaptureStreams.of(CPU))
    with cuda:
        for _ in range(2):
            api.warm_up(product)
            replay, found = api.capture(product)
            replay()
    assert torch.equal(found, product())
    captured = {stream for stream, is_captured in cuda.recorded if is_captured}
    at = next(k for k, (_, is_captured) in enumerate(cuda.recorded) if is_captured)
    before = {stream for stream, _ in cuda.recorded[:at]}
    assert len(captured) == 1 and captured < before, "the workspace was there before the first capture"
    after = [stream for stream, is_captured in cuda.recorded[at:] if not is_captured]
    assert after and captured.isdisjoint(after), "trials beside replays have a workspace of their own"


def test_trials_come_after_what_the_default_stream_was_given(cuda) -> None:
    streams = CaptureStreams.of(CPU)
    CudaGraphApi(streams).warm_up(lambda: None)
    assert streams.trials.waited_for == [cuda.default] and streams.captures is not streams.trials


def test_a_capture_that_waits_is_told_by_its_own_error_and_the_next_one_is_made(cuda) -> None:
    api = CudaGraphApi(CaptureStreams.of(CPU))
    api.capture(product)

    def waiting() -> None:
        torch.cuda.default_stream().synchronize()

    with pytest.raises(RuntimeError, match="not permitted"):
        api.capture(waiting)
    assert not cuda.recording, "the allocator gives memory back again"
    assert sorted(cuda.uses.values()) == [1], "the spoilt graph has no part in the pool any more"
    replay, _ = api.capture(product)
    replay()


def test_what_a_capture_raises_by_itself_comes_out(cuda) -> None:
    def broken() -> None:
        raise ValueError("no kernel")

    with pytest.raises(ValueError, match="no kernel"):
        CudaGraphApi(CaptureStreams.of(CPU)).capture(broken)
    assert not cuda.recording


def test_waiting_for_the_whole_device_spoils_a_capture_of_another_thread(cuda) -> None:
    """The fake behaves so, and serving must not synchronize: see stop_capture's callers."""
    with pytest.raises(RuntimeError, match="previous error"), torch.cuda.stream(torch.cuda.Stream()), recording():
        with pytest.raises(RuntimeError, match="not permitted"):
            torch.cuda.synchronize()


def test_a_candidate_that_cannot_be_captured_leaves_the_others_to_be_measured(cuda, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", cuda.current)
    monkeypatch.setattr(timers, "DeviceClock", lambda *_, **__: lambda replay: replay() or 1.0)
    timer, calls = DeviceTimer("cpu"), []

    def waiting(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if cuda.capturing:
            torch.cuda.default_stream().synchronize()
        return x + 1

    arguments = Arguments([(torch.ones(2),)])
    with pytest.raises(RuntimeError, match="not permitted"):
        timer(Implementation("op", "waits", "cuda", waiting), arguments)
    assert len(calls) == 2 and not cuda.recording
    assert timer(Implementation("op", "fine", "cuda", lambda x: x + 1), arguments) == 1.0


def test_the_fake_gpus_captures_wait_for_nothing_either() -> None:
    api = FakeGraphs()
    with pytest.raises(HostSync):
        api.capture(lambda: torch.zeros(2).add(1)[torch.tensor([True, False])])
    api.capture(lambda: torch.zeros(1, 2))
    assert api.captured == [2]
