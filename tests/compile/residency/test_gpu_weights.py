"""Weights on their way to a GPU without one: streamed through a ring, or kept on the host and copied each pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fake_gpu import GPU, FakeGraphs
from paged_driver import greedy
from python_process import run_python
from transformers import AutoModelForCausalLM
from weights_cases import assert_same, described, everything
from zoo import checkpoint, config_of, make_prompts, truth

from fuseline.compile.capture import reader, sinks
from fuseline.compile.capture.sinks import DeviceSink
from fuseline.compile.capture.weights import load_weights
from fuseline.compile.compiler import compile_model, optimize
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.residency import offload
from fuseline.compile.residency.offload import NUM_SLOTS, choose_offloaded
from fuseline.compile.residency.uploads import num_bytes

GIB, MIB = 1 << 30, 1 << 20


class LateCopies:
    """Copies that are made only when they are waited for: a buffer taken again too early spoils them."""

    def __init__(self) -> None:
        self.under_way = self.most_under_way = 0

    def buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)

        def wait() -> None:
            self.under_way -= 1
            target.copy_(source)

        return wait


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("block_bytes", [64, 4096])
def test_streamed_weights_are_those_of_the_host(family: str, block_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(sinks, "BLOCK_BYTES", block_bytes)
    config = CompileConfig(model=str(checkpoint(family, "float32")), dtype="bfloat16")
    captured, copies = described(config), LateCopies()
    requests = everything(captured)
    found = load_weights(requests, captured, config, sink=DeviceSink(torch.device("cpu"), copies=copies))
    assert_same(found, load_weights(requests, captured, config))
    assert copies.under_way == 0, "all has arrived"
    assert 1 < copies.most_under_way <= sinks.NUM_BUFFERS, "the next block is read while others are copied"


def test_dummy_weights_are_made_on_the_gpu(monkeypatch) -> None:
    """Where nothing can be copied from a host, but what a pass or the checkpoint's config has computed."""

    class Generator:
        def __init__(self, device: torch.device) -> None:
            assert device.type == "meta"

        def manual_seed(self, seed: int) -> None:
            """None takes the device's own."""

    config = CompileConfig(model=str(checkpoint("llama", "float32")), load_format="dummy")
    captured, copies = described(config), LateCopies()
    monkeypatch.setattr(torch, "Generator", Generator)
    requests = {key: source for key, source in everything(captured).items() if source.names[0] in captured.parameters}
    found = load_weights(requests, captured, config, sink=DeviceSink(torch.device("meta"), copies=copies))
    assert {tensor.device.type for tensor in found.values()} == {"meta"} and copies.most_under_way == 0


PEAK = """
import sys, torch
from weights_cases import described, everything
from fuseline.compile.config import CompileConfig
from fuseline.compile.capture.weights import load_weights
from fuseline.compile.capture.sinks import DeviceSink

config = CompileConfig(model=sys.argv[1], dtype="bfloat16")
captured = described(config)
requests = everything(captured)
def kb(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
open("/proc/self/clear_refs", "w").write("5")
before = kb("VmRSS")
loaded = load_weights(requests, captured, config, sink=DeviceSink(torch.device("meta")))
print((kb("VmHWM") - before) * 1024, sum(value.nbytes for value in loaded.values()))
"""


def test_host_memory_does_not_grow_with_the_model(tmp_path) -> None:
    """The device is meta: what is on it takes no memory, what is not counts."""
    config = config_of("mixtral")
    config.update(dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=8, vocab_size=8192))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    peak, size = map(int, run_python(PEAK, str(tmp_path), num_threads=2).split())
    ring = sinks.NUM_BUFFERS * reader.BLOCK_BYTES
    assert size > 110 * MIB and peak < ring + 30 * MIB, "the ring, the readers' blocks, what imports take"


class LateLane:
    """Copies that are made only when they are waited for."""

    def __init__(self, device: torch.device) -> None:
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_done = 0

    def fork(self) -> None:
        """Whenever the copies come, it is late enough."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> int:
        self.waiting.append((target, source))
        return self.num_done + len(self.waiting)

    def join(self, mark: int) -> None:
        while self.num_done < mark:
            target, source = self.waiting.pop(0)
            target.copy_(source)
            self.num_done += 1


def build(family: str, dtype: str = "float32", gib: float = 1.0, graphs: GraphConfig | None = None):
    config = CompileConfig(model=str(checkpoint(family, dtype)), cpu_offload_gb=gib)
    return compile_model(config, GPU, graphs=graphs)


@pytest.mark.parametrize("lane", [offload.Lane, LateLane], ids=["early", "late"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_offloaded_weights_are_there_in_time_and_until_they_are_used(family: str, lane: type, monkeypatch) -> None:
    monkeypatch.setattr(offload, "Lane", lane)
    model, prompts = build(family), make_prompts((3, 9))
    held = model._executable.offload
    assert len(held.layers) == 3 > NUM_SLOTS, "a slot is taken again within a pass"
    assert greedy(model, prompts, 4) == truth(checkpoint(family, "float32"), prompts, 4)


def test_offload_in_captured_graphs(monkeypatch) -> None:
    """A trial run copies nothing: a step may be under way beside it."""
    model, prompts, api = build("llama", graphs=GraphConfig((2,))), make_prompts((3, 9)), FakeGraphs()
    held, trials = model._executable.offload, []
    warm_up = api.warm_up

    def watch(run) -> None:
        before = [slot.clone() for slot in held.slots]
        warm_up(run)
        trials.append(all(torch.equal(old, slot) for old, slot in zip(before, held.slots, strict=True)))

    api.warm_up = watch
    allocate = model.allocate_caches

    def allocate_and_capture(num_blocks) -> None:
        for slot in held.slots:
            slot.fill_(3)
        allocate(num_blocks)
        model.capture_graphs(api=api)
        model.graphs.wait()

    model.allocate_caches = allocate_and_capture
    assert greedy(model, prompts, 4) == truth(checkpoint("llama", "float32"), prompts, 4)
    assert trials == [True] and api.replays


def test_the_last_layers_products_are_offloaded_first() -> None:
    graph = optimize(CompileConfig(model=str(checkpoint("llama", "bfloat16"))), GPU)[0].graph
    everything_held = choose_offloaded(graph, GIB)
    names = [list(layer) for layer in everything_held]
    assert len(names) == 3 and all(len(layer) == 4 for layer in names), "qkv, o, gate and up, down"
    assert not any("embed" in key or "head" in key for layer in names for key in layer)
    for spare in (0, 1):
        (last,) = choose_offloaded(graph, num_bytes(everything_held[2]) + spare)
        assert last == everything_held[2]
    part = choose_offloaded(graph, num_bytes(everything_held[2]) - 1)
    assert list(part[0]) == names[2][1:], "from the layer's end on"
    assert choose_offloaded(graph, 100) == ()


@pytest.mark.parametrize("family", ("llama", "gpt_oss"))
def test_products_are_offloaded_whatever_their_order_of_summation(family: str) -> None:
    """The ops that do not depend on the batch are products of the same weights."""
    path = str(checkpoint(family, "bfloat16"))
    plain, invariant = (
        choose_offloaded(optimize(CompileConfig(model=path, batch_invariant=on), GPU)[0].graph, GIB)
        for on in (False, True)
    )
    assert len(plain) == len(invariant) == 3
    assert sum(map(num_bytes, invariant)) == sum(map(num_bytes, plain))


def test_the_budget_table_tells_host_from_device() -> None:
    whole, held = build("llama", gib=0.0).info, build("llama").info
    slots = held.host_weight_bytes // 3 * NUM_SLOTS
    assert whole.host_weight_bytes == 0 and held.host_weight_bytes > 0
    assert held.weight_bytes == whole.weight_bytes - held.host_weight_bytes + slots
