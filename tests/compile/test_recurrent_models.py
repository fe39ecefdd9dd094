"""Models with recurrent states: greedy tokens equal to Transformers', and the same bits whatever happens around them.

Weights are random, all computing is in float32: rounding does not reach the distance of two logits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from native_fixtures import with_threads
from paged_driver import greedy
from recurrent_cases import FAMILIES, VOCAB, save_recurrent
from zoo import tokenizer

from fuseline.api.llm import LLM
from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.capture.reference import RandomModel
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.model_info import state_tensors
from fuseline.compile.target import detect_target
from fuseline.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from fuseline.engine.engine import Engine
from fuseline.engine.messages import EngineRequest
from fuseline.engine.params import SamplingParams
from fuseline.engine.run.device import HostDevice, native_ops

NUM_TOKENS = 12
LEFT = {
    "qwen3_5": {"aten.copy_"},
    "qwen4_exp": {"aten.copy_", "aten.mean.dim", "aten.repeat"},
    "recurrent_gemma": {"aten.arange"},
    "rwkv": {"aten.rsub.Scalar"},
    "xlstm": {"aten.abs", "aten.mean.dim", "aten.var.dim"},
    "zaya": {"aten.arange", "aten.clamp_min", "aten.linalg_vector_norm", "aten.stack"},
    "inkling": {"aten.arange", "aten.log"},
}
"""Ops that torch computes: Qwen3.5 interleaves its tables of positions in place, once a step."""
ROUTERS = {
    "nemotron_h_experts": {
        "aten.bitwise_not", "aten.div_.Tensor", "aten.gather", "aten.masked_fill.Scalar", "aten.scatter_.value",
        "aten.sum.dim_IntList", "aten.topk", "aten.zeros_like",
    },
    "zaya": {"aten.eq.Scalar", "aten.gather", "aten.masked_fill.Scalar", "aten.softmax.int", "aten.topk"},
    "inkling": {"aten.gather", "aten.log_sigmoid", "aten.logsumexp", "aten.topk"},
}  # fmt: skip
"""Those of routers of a model's own, of which an op may be made."""
PROMPTS = [torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (31, 9, 20)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Iterator[str]:
    yield request.param
    built.cache_clear()


@functools.cache
def built(family: str, folder: Path) -> tuple[CpuModel, RandomModel]:
    reference = save_recurrent(family, folder)
    config = CompileConfig(str(folder), level=1, cache_dir=str(folder / "cache"), skip_model_check=True)
    return compile_model(config, detect_target(1)), reference


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp(family)


def test_greedy_tokens_equal_transformers(family: str, folder: Path) -> None:
    """Transformers with its own cache, prompt for prompt."""
    model, reference = built(family, folder)
    expected = [reference.generate(prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert len(set().union(*expected)) > 3
    assert greedy(model, PROMPTS, NUM_TOKENS) == expected


def requests() -> list[EngineRequest]:
    return [
        EngineRequest(
            request_id=f"r{k}", prompt_token_ids=(k, *PROMPTS[k % len(PROMPTS)][:-1], k),
            params=SamplingParams(max_tokens=NUM_TOKENS, temperature=(0.0, 0.9)[k % 2], seed=k, logprobs=2),
        )
        for k in range(9)
    ]  # fmt: skip


def make_engine(model: CpuModel, num_blocks: int = 64, num_states: int = 4, **scheduler) -> Engine:
    counts = [num_blocks] * len(model.info.cache_groups)
    model.allocate_caches([count + 1 for count in counts])
    model.allocate_states(num_states)
    config = EngineConfig(CompileConfig(model=""), CacheConfig(), SchedulerConfig(**scheduler))
    return Engine(config, model, counts, HostDevice(native_ops()), num_states=num_states)


def answers(engine: Engine, asked: list[EngineRequest]) -> dict:
    """The outputs of each request, by id."""
    told: dict[str, list] = {request.request_id: [] for request in asked}
    for request in asked:
        engine.add(request)
    while engine.has_work:
        for output in engine.step().outputs:
            assert not output.error
            told[output.request_id].append((output.token_ids, output.logprobs))
    return told


def served(model: CpuModel, asked: list[EngineRequest], num_blocks: int = 64, num_states: int = 4, **scheduler) -> dict:
    """Answers of an engine of their own."""
    engine = make_engine(model, num_blocks, num_states, **scheduler)
    told = answers(engine, asked)
    assert num_blocks > 9 or engine.scheduler.num_preemptions > 0
    return told


def test_bits_do_not_depend_on_what_happens_around(family: str, folder: Path) -> None:
    """Batches, chunks, slots that others have left, threads, and preemption where there are blocks to lack."""
    model, _ = built(family, folder)
    alone: dict[str, list] = {}
    for request in requests():
        alone |= served(model, [request])
    assert len({str(outputs) for outputs in alone.values()}) == len(alone)
    assert served(model, requests()) == alone
    assert with_threads(2, lambda: served(model, requests(), max_num_batched_tokens=7, max_num_seqs=3)) == alone
    if model.info.cache_groups:
        assert served(model, requests(), num_blocks=9) == alone


def test_snapshots_change_no_bit(family: str, folder: Path) -> None:
    """Requests once more, one by one and together, and conversations that go on behind an answer."""
    model, _ = built(family, folder)
    asked, alone = requests()[:3], {}
    for request in asked:
        alone |= served(model, [request])
    told = [[*r.prompt_token_ids, *(t for ids, _ in alone[r.request_id] for t in ids), 7] for r in asked]
    turns = [replace(r, request_id=f"t{k}", prompt_token_ids=tuple(told[k])) for k, r in enumerate(asked)]
    for request in turns:
        alone |= served(model, [request])
    engine = make_engine(model, num_states=16, max_num_batched_tokens=24)
    for request in (*asked, *turns):
        assert answers(engine, [request]).items() <= alone.items()
    # Behind answers: 32 + 11, 10 + 11 and 21 + 11 tokens are computed, in blocks of 16.
    assert engine.scheduler.prefix_hits == 32 + 16 + 32
    assert answers(engine, [*asked, *turns]) == alone
    assert engine.scheduler.prefix_hits == 80 + 16 + 0 + 16 + 32 + 16 + 32


def test_the_memory_of_states_is_what_the_table_says(family: str, folder: Path) -> None:
    model, _ = built(family, folder)
    make_engine(model, num_blocks=5, num_states=3)
    states = sum(t.nbytes for name, t in model._caches.items() if name in state_tensors(model.info, 0))
    assert states == 3 * sum(spec.bytes_per_sequence() for spec in model.info.state_specs)


def test_states_are_copied_as_if_all_were_read_first(family: str, folder: Path) -> None:
    model, _ = built(family, folder)
    model.allocate_states(5)
    states = [model._caches[name] for name in state_tensors(model.info, 0)]
    for pairs in ([(0, 3), (0, 4)], [(0, 1), (1, 2), (3, 0)]):
        for state in states:
            state.copy_(torch.arange(5.0).view(5, *[1] * (state.dim() - 1)).expand_as(state))
        model.copy_states(np.array(pairs).T)
        written = {target: source for source, target in pairs}
        expected = torch.tensor([float(written.get(slot, slot)) for slot in range(5)])
        assert all((state.flatten(1) == expected[:, None]).all() for state in states)


def test_no_op_is_left_to_torch(family: str, folder: Path) -> None:
    model, _ = built(family, folder)
    assert model.torch_ops - ROUTERS.get(family, set()) == LEFT.get(family, set())
    assert len(model.info.state_specs) >= 3


def test_through_the_door_of_python(tmp_path: Path) -> None:
    """More choices and beams than there are slots."""
    model, _ = built("mamba2", tmp_path)
    tokenizer().save_pretrained(tmp_path)
    prompts = [list(request.prompt_token_ids) for request in requests()[:4]]
    expected = greedy(model, prompts, NUM_TOKENS)
    settings = {"cpu_threads": 1, "max_num_seqs": 3, "max_num_batched_tokens": 16, "skip_model_check": True}
    with LLM(str(tmp_path), show_progress=False, **settings) as llm:
        found = llm.generate(prompts, {"max_tokens": NUM_TOKENS, "temperature": 0.0})
        assert [list(output.outputs[0].token_ids) for output in found] == expected
        (choices,) = llm.generate(prompts[:1], {"max_tokens": NUM_TOKENS, "n": 4, "seed": 3, "temperature": 1.0})
        assert len({tuple(choice.token_ids) for choice in choices.outputs}) == 4
        (beams,) = llm.generate(prompts[:1], {"max_tokens": 4, "n": 2, "use_beam_search": True})
        assert len(beams.outputs) == 2
