"""Sleep: what each level gives back, in which order it returns, and a GPU's model that computes the same after it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from api_client import Api
from fake_gpu import GPU, FakeGraphs
from fake_model import FakeModel, fake_config
from paged_driver import greedy
from zoo import checkpoint, make_prompts, truth

from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.memory import PinnedPages
from fuseline.engine.messages import CallDone, CallFailed, Sleep, WakeUp
from fuseline.engine.run.sampler_reference import reference_device
from fuseline.engine.service import EngineService
from fuseline.engine.sleep import Sleeper


class SleepyModel(FakeModel):
    """Writes down what it is told."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def allocate_caches(self, num_blocks) -> None:
        self.log.append(f"caches of {num_blocks[0]}")

    def move_weights_to_host(self) -> None:
        self.log.append("to host")

    def move_weights_back(self) -> None:
        self.log.append("back")

    def discard_weights(self) -> None:
        self.log.append("discard")


class Holder:
    def __init__(self, model: FakeModel) -> None:
        self.model = model


def make_sleep() -> tuple[Sleeper, list[str]]:
    log: list[str] = []

    def build() -> SleepyModel:
        log.append("build")
        return SleepyModel(log)

    return Sleeper(Holder(SleepyModel(log)), build, lambda model: model.allocate_caches([9])), log


ALL = ("weights", "kv_cache")


@pytest.mark.parametrize(
    ("levels", "wakes", "expected"),
    [
        ([0], [ALL], []),
        ([1], [ALL], ["caches of 1", "to host", "back", "caches of 9"]),
        ([2], [ALL], ["caches of 1", "discard", "build", "caches of 9"]),
        ([1, 2], [ALL], ["caches of 1", "to host", "discard", "build", "caches of 9"]),
        ([2, 1, 2], [ALL], ["caches of 1", "discard", "build", "caches of 9"]),
        ([2], [("weights",), ("kv_cache",)], ["caches of 1", "discard", "build", "caches of 9"]),
        ([1], [("kv_cache",), ("weights",)], ["caches of 1", "to host", "back", "caches of 9"]),
        ([1], [("kv_cache",), ("kv_cache",)], ["caches of 1", "to host"]),
    ],
)  # fmt: skip
def test_what_goes_comes_back_once(levels, wakes, expected) -> None:
    sleep, log = make_sleep()
    for level in levels:
        sleep.deepen(level)
    awake = [sleep.wake(tags) for tags in wakes]
    assert log == expected
    assert awake == [False] * (len(wakes) - 1) + [expected[-1:] != ["to host"]]


def test_weights_without_room_on_the_host_stay_and_the_engine_wakes(monkeypatch) -> None:
    def refuse(self) -> None:
        raise MemoryError("900.00 GiB of host memory cannot be pinned: out of memory")

    monkeypatch.setattr(SleepyModel, "move_weights_to_host", refuse)
    service = EngineService(fake_config(), lambda *_: SleepyModel([]), reference_device, lambda message: None)
    result = service._answer(Sleep(1, 1))
    assert result == CallFailed(1, "900.00 GiB of host memory cannot be pinned: out of memory")
    assert service.engine.is_asleep
    assert service._answer(WakeUp(2)) == CallDone(2) and not service.engine.is_asleep
    for call, error in ((Sleep(3, 3), "level must be 0, 1 or 2, not 3"), (WakeUp(4, ("food",)), "no tag food")):
        failed = service._answer(call)
        assert failed.call_id == call.call_id and error in failed.error


def test_a_failed_registration_is_nobody_elses_error(monkeypatch) -> None:
    class Runtime:
        cudaError = SimpleNamespace(success=0)
        cudaHostRegister = staticmethod(lambda *_: 2)
        cudaGetErrorString = staticmethod(lambda status: "out of memory")

    launched = []
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch, "ones", lambda *_, device: launched.append(device))
    with pytest.raises(MemoryError, match="0.00 GiB of host memory cannot be pinned: out of memory"):
        PinnedPages().zeros((8,), torch.uint8)
    assert launched == ["cuda"]


@pytest.mark.parametrize("gib", [0.0, 1.0], ids=["on the GPU", "offloaded"])
def test_a_gpus_weights_leave_it_and_return(gib: float) -> None:
    family, prompts = "llama", make_prompts((3, 9))
    config = CompileConfig(model=str(checkpoint(family, "float32")), cpu_offload_gb=gib)
    model = compile_model(config, GPU)
    model.allocate_caches([8])
    model.capture_graphs(api=FakeGraphs())
    model.move_weights_to_host()
    assert model.graphs is None, "graphs read what is gone"
    storages = model._weights._storages
    assert len(storages) > 5 and all(storage.nbytes() == 0 for storage in storages)
    model.move_weights_back()
    assert model._weights._host is None
    assert greedy(model, prompts, 4) == truth(checkpoint(family, "float32"), prompts, 4)
    model.move_weights_to_host()
    model.discard_weights()
    assert model._weights._host is None and all(storage.nbytes() == 0 for storage in storages)


def test_sleep_over_http(monkeypatch) -> None:
    monkeypatch.setenv("FUSELINE_SERVER_DEV_MODE", "1")
    api = Api(enable_sleep_mode=True)
    try:
        asked = {"prompt": "Once", "temperature": 0, "max_tokens": 4}
        before = api.answer("/v1/completions", **asked)["choices"][0]["text"]
        assert api.call("POST", "/sleep?level=2").status_code == 200
        assert api.call("POST", "/wake_up?tags=food").status_code == 400
        for tag, is_sleeping in (("weights", True), ("kv_cache", False)):
            assert api.call("POST", f"/wake_up?tags={tag}").status_code == 200
            assert api.call("GET", "/is_sleeping").json() == {"is_sleeping": is_sleeping}
        assert api.answer("/v1/completions", **asked)["choices"][0]["text"] == before
    finally:
        api.close()


def test_sleep_needs_its_flag(monkeypatch) -> None:
    monkeypatch.setenv("FUSELINE_SERVER_DEV_MODE", "1")
    api = Api()
    try:
        refused = api.call("POST", "/sleep")
        assert refused.status_code == 400 and "--enable-sleep-mode" in refused.json()["error"]["message"]
        assert api.call("GET", "/is_sleeping").json() == {"is_sleeping": False}
    finally:
        api.close()
