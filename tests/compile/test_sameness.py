"""A request's tokens and log-probabilities are the same, bit for bit, whatever happens around it.

Each request is first computed alone: level 1, one thread, its whole prompt in one step, no prefix to find. Every test
changes one thing and expects the same numbers: the batch, the order of arrival, the chunks of prompts, prefix hits,
preemption, threads, the level, the door (Python's LLM). Half of the requests are sampled, half are greedy, some have
the log-probabilities of their prompts.
"""

from __future__ import annotations

import atexit
import functools
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from native_fixtures import with_threads
from transformers import LlamaConfig
from zoo import FAMILIES, checkpoint, texts

from fuseline.api.llm import LLM
from fuseline.api.llm_values import RequestOutput
from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target
from fuseline.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from fuseline.engine.engine import Engine
from fuseline.engine.messages import EngineRequest
from fuseline.engine.params import SamplingParams
from fuseline.engine.run.device import HostDevice, native_ops

NUM_REQUESTS, NUM_TOKENS, NUM_BLOCKS = 64, 10, 1024
LENGTHS = (9, 15, 28, 40, 3, 62, 33, 1)
WIDE = "llama of the width of SmolLM2-135M"
MODELS = [
    ("llama", "float32"), ("llama", "bfloat16"), ("gemma2", "bfloat16"), ("qwen3_moe", "float32"), (WIDE, "bfloat16"),
    ("deepseek_v3", "bfloat16"),
]  # fmt: skip
"""Full attention; a window and a soft-cap; experts; rows as long as real ones; latents. All that runs is ours."""


@pytest.fixture(params=MODELS, ids="-".join)
def model(request) -> CpuModel:
    return build(*request.param)


@functools.cache
def build(family: str, dtype: str, level: int = 1, off: tuple[str, ...] = ()) -> CpuModel:
    path, load_format = (wide(dtype), "dummy") if family == WIDE else (checkpoint(family, dtype), "auto")
    config = CompileConfig(str(path), load_format=load_format, level=level, wait_compiled=True, disabled_passes=off)
    return compile_model(config, detect_target(1))


@functools.cache
def wide(dtype: str) -> Path:
    """A configuration; its weights are random."""
    folder = Path(tempfile.mkdtemp(prefix="fuseline-wide-"))
    atexit.register(shutil.rmtree, folder)
    LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=4096, max_position_embeddings=256, eos_token_id=None, bos_token_id=None, dtype=dtype,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@functools.cache
def requests() -> list[EngineRequest]:
    """Beginnings of the texts that the models know, each with a first token of its own: no two share a prefix."""
    made = []
    for k in range(NUM_REQUESTS):
        prompt = [k, *texts()[k % len(texts()), : LENGTHS[k % len(LENGTHS)]].tolist()]
        params = SamplingParams(
            max_tokens=NUM_TOKENS, temperature=(0.0, 0.8)[k % 2], top_p=0.9, seed=k, logprobs=3,
            prompt_logprobs=1 if k % 16 == 5 else None,
        )  # fmt: skip
        made.append(EngineRequest(request_id=f"r{k}", prompt_token_ids=tuple(prompt), params=params))
    return made


def make_engine(model: CpuModel, num_blocks: int = NUM_BLOCKS, caching: bool = True, **scheduler) -> Engine:
    counts = [num_blocks] * len(model.info.cache_groups)
    model.allocate_caches([count + 1 for count in counts])
    config = EngineConfig(
        CompileConfig(model=""), CacheConfig(enable_prefix_caching=caching), SchedulerConfig(**scheduler)
    )
    return Engine(config, model, counts, HostDevice(native_ops()))


def run(engine: Engine, asked: Sequence[EngineRequest], arrivals: Sequence[int] = ()) -> dict[str, tuple]:
    """The outputs of each request, by id. `arrivals`: the step before which each one comes.

    Leaves in `engine.sizes` how many sequences ran at the beginnings of steps.
    """
    told: dict[str, list] = {request.request_id: [] for request in asked}
    engine.sizes = set()
    pending = sorted(zip(arrivals or [0] * len(asked), asked, strict=True), key=lambda item: item[0])
    step = 0
    while pending or engine.has_work:
        while pending and pending[0][0] <= step:
            engine.add(pending.pop(0)[1])
        engine.sizes.add(len(engine.scheduler.running))
        for output in engine.step().outputs:
            assert not output.error
            told[output.request_id].append((output.token_ids, output.logprobs, output.prompt_logprobs))
        step += 1
    return {name: tuple(outputs) for name, outputs in told.items()}


@functools.cache
def alone(model: CpuModel) -> dict[str, tuple]:
    """Each request in an engine without any other, or what it left behind."""
    engine = make_engine(model, caching=False)
    found: dict[str, tuple] = {}
    for request in requests():
        found |= run(engine, [request])
    assert all(len(outputs) == NUM_TOKENS for outputs in found.values())
    assert len(set(found.values())) > NUM_REQUESTS / 2
    return found


def check(model: CpuModel, found: dict[str, tuple]) -> None:
    expected = alone(model)
    assert found and [name for name in found if found[name] != expected[name]] == []


@pytest.mark.parametrize("batch", [1, 2, 5, 16, 64])
def test_any_batch(model: CpuModel, batch: int) -> None:
    """The first few by so many places; all 64 by as many places as it takes to start them together."""
    engine = make_engine(model, max_num_seqs=batch if batch < NUM_REQUESTS else 256)
    check(model, run(engine, requests()[: max(batch, 8)]))
    assert max(engine.sizes) == batch


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_arrival(model: CpuModel, seed: int) -> None:
    asked, chance = list(requests()[:24]), random.Random(seed)
    chance.shuffle(asked)
    check(model, run(make_engine(model, max_num_seqs=8), asked, [chance.randrange(30) for _ in asked]))


@pytest.mark.parametrize("budget", [4, 7, 16, 33, 256])
def test_any_chunks_of_prompts(model: CpuModel, budget: int) -> None:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": budget, "max_num_partial_prefills": 2}
    check(model, run(make_engine(model, **settings), requests()[:16]))


def test_prefix_hits(model: CpuModel) -> None:
    engine, asked = make_engine(model), requests()[:16]
    check(model, run(engine, asked))
    misses = engine.scheduler.prefix_hits
    check(model, run(engine, asked))
    assert misses == 0 and engine.scheduler.prefix_hits > 16 * 5


def test_preemption(model: CpuModel) -> None:
    engine = make_engine(model, num_blocks=10, max_num_seqs=8)
    check(model, run(engine, requests()[:24]))
    assert engine.scheduler.num_preemptions > 1


def test_two_threads(model: CpuModel) -> None:
    check(model, with_threads(2, lambda: run(make_engine(model, max_num_seqs=16), requests())))
    check(model, with_threads(2, lambda: run(make_engine(model, max_num_seqs=1), requests()[:8])))


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("names", MODELS[1:3], ids="-".join)
def test_levels(names: tuple[str, str], level: int) -> None:
    higher = build(*names, level)
    found = run(make_engine(higher, max_num_seqs=5), requests()[:16])
    found |= run(make_engine(higher, max_num_seqs=64), requests()[16:])
    check(build(*names), found)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    """Batch and chunks, then both threads."""
    model = build(family, "bfloat16")
    check(model, run(make_engine(model, max_num_seqs=64), requests()))
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 7}
    check(model, with_threads(2, lambda: run(make_engine(model, **settings), requests()[:16])))


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("names", [("cohere", "bfloat16"), ("cohere", "float32")], ids="-".join)
def test_regions(names: tuple[str, str], level: int) -> None:
    """Within a level, where torch or inductor computes a part: norms, without their op."""
    model = build(*names, level, ("find_norm",))
    for batch, budget in ((2, 2048), (16, 2048), (64, 100)):
        engine = make_engine(model, max_num_seqs=batch, max_num_batched_tokens=budget)
        check(model, run(engine, requests()[: max(8, batch)]))


def told(outputs: Sequence[RequestOutput]) -> list[tuple]:
    return [(choice.token_ids, choice.logprobs) for choice in (output.outputs[0] for output in outputs)]


def test_through_the_door_of_python() -> None:
    """All at once, then one by one, then in small chunks at another level, through the whole server."""
    asked = [list(request.prompt_token_ids) for request in requests()[:12]]
    sampling = {"temperature": 0.8, "max_tokens": NUM_TOKENS, "seed": 5, "logprobs": 2, "ignore_eos": True}
    settings = {"model": str(checkpoint("llama", "bfloat16")), "num_gpu_blocks_override": 200, "cpu_threads": 1}
    with LLM(**settings, compilation_config=1) as llm:
        together = told(llm.generate(asked, sampling))
        one_by_one = [told(llm.generate([prompt], sampling))[0] for prompt in asked]
    settings |= {"compilation_config": 3, "max_num_seqs": 3, "max_num_batched_tokens": 5}
    with LLM(**settings) as llm:
        chunked = told(llm.generate(asked, sampling))
    assert len(set(map(str, together))) == len(asked) and all(len(tokens) == NUM_TOKENS for tokens, _ in together)
    assert together == one_by_one == chunked
