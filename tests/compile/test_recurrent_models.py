"""Models with recurrent states: greedy tokens equal to Transformers', and the same bits whatever happens around them.

Weights are random, all computing is in float32: rounding does not reach the distance of two logits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from native_fixtures import with_threads
from paged_driver import greedy
from zoo import tokenizer

from fuseline.api.llm import LLM
from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.capture.reference import RandomModel
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target
from fuseline.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from fuseline.engine.engine import Engine
from fuseline.engine.messages import EngineRequest
from fuseline.engine.params import SamplingParams
from fuseline.engine.run.device import HostDevice, native_ops

VOCAB, NUM_TOKENS = 128, 12
PROMPTS = [torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (31, 9, 20)]
COMMON: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, vocab_size=VOCAB, max_position_embeddings=256,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
HEADS: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2)
DELTA: dict[str, Any] = COMMON | HEADS | dict(
    head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=24,
    full_attention_interval=2,
)  # fmt: skip
MAMBA2: dict[str, Any] = COMMON | HEADS | dict(
    mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=12, mamba_chunk_size=8,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", DELTA | EXPERTS | dict(shared_expert_intermediate_size=48)),
    "qwen3_5": ("Qwen3_5TextConfig", DELTA),
    "mamba2": ("Mamba2Config", COMMON | dict(num_heads=8, head_dim=16, n_groups=2, state_size=12, chunk_size=8)),
    "granitemoehybrid": ("GraniteMoeHybridConfig", MAMBA2 | dict(
        layer_types=["mamba", "attention", "mamba", "mamba"], num_local_experts=4, num_experts_per_tok=2,
        shared_intermediate_size=48)),
    "lfm2": ("Lfm2Config", COMMON | HEADS | dict(
        layer_types=["conv", "full_attention", "conv", "conv"], block_multiple_of=8)),
    "nemotron_h": ("NemotronHConfig", COMMON | HEADS | dict(
        layers_block_type=["mamba", "mlp", "attention", "mamba"], head_dim=16, mamba_num_heads=8, mamba_head_dim=16,
        n_groups=2, ssm_state_size=12, chunk_size=8)),
    "bamba": ("BambaConfig", MAMBA2 | dict(attn_layer_indices=[1])),
    "falcon_h1": ("FalconH1Config", MAMBA2 | dict(mamba_d_ssm=128)),
    "jamba": ("JambaConfig", COMMON | HEADS | dict(
        attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2, num_experts=4,
        mamba_d_state=12, mamba_dt_rank=8)),
    "mamba": ("MambaConfig", COMMON | dict(state_size=12, intermediate_size=96, time_step_rank=8)),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Iterator[str]:
    yield request.param
    built.cache_clear()


@functools.cache
def built(family: str, folder: Path) -> tuple[CpuModel, RandomModel]:
    name, fields = FAMILIES[family]
    reference = RandomModel(getattr(transformers, name)(**fields), False, seed=3)
    reference.save(folder)
    config = CompileConfig(str(folder), level=1, cache_dir=str(folder / "cache"), skip_model_check=True)
    return compile_model(config, detect_target(1)), reference


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp(family)


def test_greedy_tokens_equal_transformers(family: str, folder: Path) -> None:
    """Transformers with its own cache, prompt for prompt."""
    model, reference = built(family, folder)
    expected = [reference.generate(prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert len(set(expected[0])) > 3
    assert greedy(model, PROMPTS, NUM_TOKENS) == expected


def requests() -> list[EngineRequest]:
    return [
        EngineRequest(
            request_id=f"r{k}", prompt_token_ids=tuple([k, *PROMPTS[k % len(PROMPTS)]]),
            params=SamplingParams(max_tokens=NUM_TOKENS, temperature=(0.0, 0.9)[k % 2], seed=k, logprobs=2),
        )
        for k in range(9)
    ]  # fmt: skip


def served(model: CpuModel, asked: list[EngineRequest], num_blocks: int = 64, num_states: int = 4, **scheduler) -> dict:
    """The outputs of each request, by id."""
    counts = [num_blocks] * len(model.info.cache_groups)
    model.allocate_caches([count + 1 for count in counts])
    model.allocate_states(num_states)
    config = EngineConfig(CompileConfig(model=""), CacheConfig(), SchedulerConfig(**scheduler))
    engine = Engine(config, model, counts, HostDevice(native_ops()), num_states=num_states)
    told: dict[str, list] = {request.request_id: [] for request in asked}
    for request in asked:
        engine.add(request)
    while engine.has_work:
        for output in engine.step().outputs:
            assert not output.error
            told[output.request_id].append((output.token_ids, output.logprobs))
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


def test_no_op_is_left_to_torch(family: str, folder: Path) -> None:
    """But Qwen3.5's tables of positions, which it interleaves in place, once a step."""
    model, _ = built(family, folder)
    assert model._executable.num_regions == (family == "qwen3_5")
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
