"""The whole engine over a real model on a GPU that is none: the CPU engine's answers, one step ahead, nothing waited
for but the tokens of the step before."""

from __future__ import annotations

import pytest
from cuda_target_cases import build
from engine_walk_cases import Walk
from fake_gpu import FakeGpu, HostSync
from zoo import checkpoint, make_prompts, truth

from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.target import detect_target
from fuseline.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from fuseline.engine.engine import Engine
from fuseline.engine.messages import EngineReady, Progress, Shutdown
from fuseline.engine.run.device import HostDevice, native_ops
from fuseline.engine.run.warm_up import trial_steps
from fuseline.engine.service import EngineService

FAMILY = "llama"
NUM_TOKENS = 6
PROMPTS = make_prompts((3, 15, 20, 14, 5, 17))
GREEDY = {"temperature": 0.0, "max_tokens": NUM_TOKENS}
ASKED = (
    GREEDY | {"logprobs": 2},
    GREEDY | {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"temperature": 0.9, "top_p": 0.9, "seed": 5, "max_tokens": NUM_TOKENS, "logprobs": 0},
    GREEDY | {"stop_token_ids": tuple(range(0, 128, 3)), "prompt_logprobs": 1},
    GREEDY | {"bad_words": ((1, 2), (7,)), "min_tokens": 2, "eos_token_ids": tuple(range(1, 128, 4))},
    {"temperature": 1.0, "seed": 9, "max_tokens": NUM_TOKENS, "presence_penalty": 0.5, "top_k": 5},
)


def make_config(num_blocks: int) -> EngineConfig:
    return EngineConfig(
        CompileConfig(model=str(checkpoint(FAMILY))),
        cache=CacheConfig(num_gpu_blocks_override=num_blocks),
        scheduler=SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=4),
    )


@pytest.fixture(scope="module")
def on_cpu():
    return compile_model(CompileConfig(model=str(checkpoint(FAMILY))), detect_target(1))


def gpu_engine(num_blocks: int, num_host_blocks: int = 0, **settings: object) -> Engine:
    model = build(FAMILY, "float32", GraphConfig((2, 4)), **settings)
    device = FakeGpu(model)
    model.allocate_caches([num_blocks + 1])
    host = [num_host_blocks] if num_host_blocks else []
    if host:
        model.allocate_host_blocks(host)
    device.capture_graphs(model, lambda *progress: None)
    model.graphs.wait()
    return Engine(make_config(num_blocks), model, [num_blocks], device, host)


def answers(engine: Engine, asked: tuple[dict, ...]) -> list[tuple]:
    """The outputs of each request; request k comes before step k."""
    walk = Walk(engine)
    for prompt, params in zip(PROMPTS, asked, strict=False):
        walk.submit(prompt, **params)
        walk.step()
    walk.finish()
    told = []
    for name in walk.requests:
        outputs = walk.outputs[name, 0]
        scores = [entry for output in outputs for entry in output.logprobs]
        scores += [entry for output in outputs for entry in output.prompt_logprobs or () if entry is not None]
        told.append((walk.tokens(name), walk.reason(name), outputs[-1].stop_token_id, scores))
    return told


@pytest.mark.parametrize(
    ("num_blocks", "num_host_blocks"), [(32, 0), (4, 0), (4, 8)], ids=["room for all", "preemption", "swapping"]
)
def test_answers_are_those_of_the_cpu(on_cpu, num_blocks: int, num_host_blocks: int, monkeypatch) -> None:
    on_cpu.allocate_caches([33])
    expected = answers(Engine(make_config(32), on_cpu, [32], HostDevice(native_ops())), ASKED)
    engine, swapped = gpu_engine(num_blocks, num_host_blocks), []
    device, swap = engine.runner.device, engine.runner.model.swap
    monkeypatch.setattr(engine.runner.model, "swap", lambda copies: (swapped.extend(copies), swap(copies)))
    with device.guard():
        found = answers(engine, ASKED)
    for (*mine, scores), (*others, expected_scores) in zip(found, expected, strict=True):
        assert mine == others
        for a, b in zip(scores, expected_scores, strict=True):
            assert (a.token_id, a.rank, a.top_ids) == (b.token_id, b.rank, b.top_ids)
            assert abs(a.logprob - b.logprob) < 1e-3
    assert {reason for _, reason, *_ in found} == {"length", "stop"}
    assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 4)
    assert {copy.is_out for copy in swapped} == ({True, False} if num_host_blocks else set())
    assert set(device.graphs.replays) == {2, 4}, "decode steps were replayed"
    check_waits(device, engine)


@pytest.mark.parametrize("flag", ["fp8", "fp8_e5m2"])
def test_answers_over_an_fp8_cache_are_near_those_of_the_cpu(on_cpu, flag: str) -> None:
    """Scaled by the first step, in steps that are replayed too."""
    on_cpu.allocate_caches([33])
    asked = (GREEDY | {"logprobs": 0, "prompt_logprobs": 0},) * 3
    expected = answers(Engine(make_config(32), on_cpu, [32], HostDevice(native_ops())), asked)
    engine = gpu_engine(32, kv_cache_dtype=flag, calculate_kv_scales=True)
    with engine.runner.device.guard():
        found = answers(engine, asked)
    pairs = [pair for mine, its in zip(found, expected, strict=True) for pair in zip(mine[-1], its[-1], strict=True)]
    drift = max(abs(mine.logprob - its.logprob) for mine, its in pairs)
    assert [told[:-1] for told in found] == [told[:-1] for told in expected]
    assert 1e-5 < drift < 2e-3, "stored in fewer bits"
    assert engine.runner.device.graphs.replays


def check_waits(device: FakeGpu, engine: Engine) -> None:
    """A step is read when the next is on its way, or sooner if that one asks for its tokens on the host; once each."""
    log = device.log
    assert [n for kind, n in log if kind == "read"] == [n for kind, n in log if kind == "sent"]
    ahead = sum(before == ("sent", n + 1) for before, (kind, n) in zip(log, log[1:], strict=False) if kind == "read")
    assert ahead > len(log) / 5 and log[-1] == ("read", len(log) // 2 - 1)


def test_greedy_tokens_equal_transformers() -> None:
    engine = gpu_engine(32)
    with engine.runner.device.guard():
        found = answers(engine, (GREEDY,) * 3)
    assert [tokens for tokens, *_ in found] == truth(checkpoint(FAMILY), PROMPTS[:3], NUM_TOKENS)
    log = engine.runner.device.log
    last = len(log) // 2 - 1
    assert log == [("sent", 0), *((kind, n + (kind == "sent")) for n in range(last) for kind in ("sent", "read")),
                   ("read", last)]  # fmt: skip


def test_reading_what_lies_on_the_gpu_is_noticed() -> None:
    engine = gpu_engine(32)
    walk = Walk(engine)
    walk.submit(PROMPTS[0], **GREEDY)
    with engine.runner.device.guard():
        walk.step()
        with pytest.raises(HostSync):
            engine.runner._sampled.tolist()


def test_a_gpu_is_started_warm_sized_and_captured() -> None:
    """Caches fill what the share of the GPU leaves beside the model, the steps and the graphs."""
    graphs = GraphConfig((1, 2), mixed_sizes=(4,))
    model = build(FAMILY, "float32", graphs, max_num_seqs=2)
    device, sent = FakeGpu(model), []
    config = EngineConfig(
        CompileConfig(model=""), graphs=graphs,
        scheduler=SchedulerConfig(max_num_batched_tokens=4, max_num_seqs=2),
    )  # fmt: skip
    service = EngineService(config, lambda config, progress: model, lambda config: device, sent.append)
    model.graphs.wait()
    assert trial_steps(config, 256) == [[2, 2], [4], [3], [1, 1], [1]] and device.rehearsed == [2, 5 + 8]
    assert sent[: sum(device.rehearsed)] == [Progress("warming up", k, 15) for k in range(1, 16)]
    assert Progress("capturing graphs", 3, 3) in sent and device.graphs.captured == [2, 1]
    (ready,) = (m for m in sent if isinstance(m, EngineReady))
    table = dict(ready.table)
    assert table["device"] == "fake GPU" and table["a step at most"] == "1.0 MiB"
    assert table["kept for graphs"] == f"{2 * 2 + 3 * 8:.1f} MiB", "a mixed step is twice as high as a decode step"
    assert model._caches["k_cache_0"].shape[0] == ready.num_blocks + 1
    walk = Walk(service.engine)
    walk.submit(PROMPTS[0], **GREEDY)
    walk.finish()
    assert [walk.tokens("r0")] == truth(checkpoint(FAMILY), PROMPTS[:1], NUM_TOKENS)
    service._sleep(1)
    assert model.graphs is None, "graphs read caches that are gone"
    service._wake_up(("weights", "kv_cache"))
    model.graphs.wait()
    assert device.graphs.captured == [2, 1, 2, 1]
    service._sleep(2)
    service.run(ShutDown())


class ShutDown:
    def wake(self) -> None:
        """Nothing is compiled that could be ready."""

    def receive(self, wait: bool) -> Shutdown:
        return Shutdown()
