"""Engines over KV caches of codes: prefix hits, recomputed and forked sequences give the bits of the plain way."""

from __future__ import annotations

import pytest
from engine_walk_cases import Walk
from paged_driver import greedy
from zoo import checkpoint, make_prompts, truth

from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target
from fuseline.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from fuseline.engine.engine import Engine
from fuseline.engine.params import BeamParams
from fuseline.engine.run.device import HostDevice, native_ops

PROMPTS = make_prompts((3, 9, 20, 14, 5, 17))
GREEDY = {"temperature": 0.0, "max_tokens": 20, "logprobs": 0}
PATH = checkpoint("llama", "bfloat16")


@pytest.fixture(scope="module", params=["int8", "fp8", "fp8_e5m2"])
def model(request):
    return compile_model(CompileConfig(model=str(PATH), kv_cache_dtype=request.param), detect_target(1))


def engine_of(model, num_blocks: int) -> Engine:
    model.allocate_caches([num_blocks + 1])
    config = EngineConfig(
        CompileConfig(model=str(PATH)), cache=CacheConfig(num_gpu_blocks_override=num_blocks),
        scheduler=SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=4),
    )  # fmt: skip
    return Engine(config, model, [num_blocks], HostDevice(native_ops()))


def told(walk: Walk, name: str) -> tuple:
    return walk.tokens(name), [entry.logprob for output in walk.outputs[name, 0] for entry in output.logprobs]


def answer(engine: Engine, *prompts: list[int], **params: object) -> list[tuple]:
    """Request k comes before step k."""
    walk = Walk(engine)
    for prompt in prompts:
        walk.submit(prompt, **GREEDY | params)
        walk.step()
    walk.finish()
    return [told(walk, name) for name in walk.requests]


def test_together_alone_after_preemption_and_from_the_prefix_cache(model) -> None:
    engine = engine_of(model, 32)
    together = answer(engine, *PROMPTS)
    assert [tokens for tokens, _ in together] == truth(PATH, PROMPTS, 20)
    again = answer(engine, *PROMPTS)
    assert again == together and engine.kv is not None
    alone = [answer(engine_of(model, 32), prompt)[0] for prompt in PROMPTS]
    assert alone == together
    tight = engine_of(model, 4)
    assert answer(tight, *PROMPTS) == together and tight.scheduler.num_preemptions > 0


def test_beams_are_forked_in_blocks_of_codes(model) -> None:
    """A fork has a copy of the block that is partly filled; where there is no room, it is computed anew."""

    def beams(num_blocks: int) -> list[list[int]]:
        walk = Walk(engine_of(model, num_blocks))
        name = walk.submit(PROMPTS[2], n=3, temperature=0.0, max_tokens=6, logprobs=6, beams=BeamParams())
        walk.finish()
        return [list(walk.outputs[name, index][-1].token_ids) for index in range(3)]

    found = beams(32)
    assert found[0] == truth(PATH, PROMPTS[2:3], 6)[0] and found == beams(3)


@pytest.mark.parametrize(("flag", "level"), [("int8", 0), ("fp8", 0), ("int8", 3)])
def test_reference_ops_and_plans_of_decode_steps_have_such_caches(flag: str, level: int) -> None:
    config = CompileConfig(model=str(PATH), kv_cache_dtype=flag, level=level, skip_model_check=True)
    model = compile_model(config, detect_target(1))
    assert greedy(model, PROMPTS[:2], 6) == truth(PATH, PROMPTS[:2], 6)
