"""Kinds of attention beyond Llama's: greedy tokens equal to Transformers', whatever else is in the step.

Weights are random, all computing is in float32: rounding does not reach the distance of two logits. Prompts are longer
than every window and chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from paged_driver import greedy

from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.capture.artifact import load_or_capture
from fuseline.compile.capture.captured import facts_of
from fuseline.compile.capture.errors import CaptureError, LoadError
from fuseline.compile.capture.reference import RandomModel
from fuseline.compile.capture.small_config import small_config
from fuseline.compile.check import row_errors, serve
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.model_info import model_limit
from fuseline.compile.target import detect_target

VOCAB, NUM_TOKENS = 128, 12
PROMPTS = [torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (31, 9, 20)]
IDS: dict[str, Any] = dict(vocab_size=VOCAB, bos_token_id=None, eos_token_id=None, pad_token_id=None)
COMMON: dict[str, Any] = IDS | dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256,
)  # fmt: skip
BLOOM: dict[str, Any] = IDS | dict(hidden_size=72, n_layer=3, n_head=6)
FALCON: dict[str, Any] = IDS | dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
LLAMA4: dict[str, Any] = COMMON | dict(
    head_dim=16, attention_chunk_size=8, intermediate_size_mlp=80, num_local_experts=4, floor_scale=5,
    attn_temperature_tuning=True, no_rope_layers=[1, 1, 0, 1], interleave_moe_layer_step=2,
)  # fmt: skip
GEMMA3N: dict[str, Any] = dict(
    num_hidden_layers=6, head_dim=16, sliding_window=8, num_kv_shared_layers=2, vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=8, laurel_rank=8, intermediate_size=[96] * 6, activation_sparsity_pattern=[0.5] * 6,
    layer_types=["sliding_attention", "full_attention"] * 3,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2, moe_intermediate_size=32)
LATENT: dict[str, Any] = dict(
    num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
)  # fmt: skip
INDEXED: dict[str, Any] = LATENT | EXPERTS | dict(
    n_routed_experts=8, n_group=2, topk_group=1, index_topk=64, index_n_heads=2, index_head_dim=16,
)  # fmt: skip
NEO: dict[str, Any] = IDS | dict(hidden_size=64, num_layers=4, num_heads=4, intermediate_size=96, window_size=8)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", BLOOM),
    "mpt": ("MptConfig", IDS | dict(d_model=72, n_heads=6, n_layers=3, max_seq_len=256)),
    "falcon": ("FalconConfig", FALCON),
    "falcon_alibi": ("FalconConfig", FALCON | dict(alibi=True, multi_query=False, parallel_attn=False, bias=True)),
    "falcon_new": ("FalconConfig", FALCON | dict(new_decoder_architecture=True, num_kv_heads=2)),
    "llama4": ("Llama4TextConfig", LLAMA4),
    "llama4_top2": ("Llama4TextConfig", LLAMA4 | dict(num_experts_per_tok=2, use_qk_norm=False)),
    "diffllama": ("DiffLlamaConfig", COMMON),
    "doge": ("DogeConfig", COMMON),
    "gemma3n": ("Gemma3nTextConfig", COMMON | GEMMA3N),
    "deepseek_v32": ("DeepseekV32Config", COMMON | INDEXED),
    "hy_v4": ("HYV4Config", COMMON | INDEXED | dict(
        indexer_types=["full", "shared", "full", "shared"], n_group=1, swiglu_limit=0.5)),
    "dory": ("DoryConfig", COMMON | dict(
        head_dim=16, sliding_window=8, n_input_layers=1, n_output_layers=1, initializer_range=1.0)),
    "git": ("GitConfig", COMMON | dict(vision_config=dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))),
    "beam": ("BeamConfig", COMMON | EXPERTS | dict(num_experts=8, n_group=2, topk_group=1, sliding_window=8)),
    "dbrx": ("DbrxConfig", IDS | dict(
        d_model=64, n_heads=4, n_layers=3, max_seq_len=256, ffn_config=dict(ffn_hidden_size=48, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=2.0, rope_theta=1e4))),
    "jetmoe": ("JetMoeConfig", COMMON | dict(kv_channels=16, num_local_experts=4, num_experts_per_tok=2)),
    "longcat_flash": ("LongcatFlashConfig", COMMON | LATENT | dict(
        head_dim=8, num_layers=2, ffn_hidden_size=96, expert_ffn_hidden_size=32, n_routed_experts=4, zero_expert_num=3,
        moe_topk=3)),
    "gpt_neo": ("GPTNeoConfig", NEO | dict(attention_types=[[["global", "local"], 2]])),
    "gpt_neox_japanese": ("GPTNeoXJapaneseConfig", COMMON | dict(intermediate_multiple_size=2)),
    "openai_gpt": ("OpenAIGPTConfig", IDS | dict(n_embd=64, n_layer=3, n_head=4, n_positions=256)),
    "xglm": ("XGLMConfig", IDS | dict(d_model=64, ffn_dim=96, num_layers=3, attention_heads=4)),
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
    config = CompileConfig(
        str(folder), level=1, cache_dir=str(folder / "cache"), skip_model_check=True, max_num_batched_tokens=64,
        max_num_seqs=64,
    )  # fmt: skip
    return compile_model(config, detect_target(1)), reference


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp(family)


def test_greedy_tokens_equal_transformers(family: str, folder: Path) -> None:
    model, reference = built(family, folder)
    expected = [reference.generate(prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert greedy(model, PROMPTS, NUM_TOKENS) == expected
    assert greedy(model, PROMPTS, NUM_TOKENS, chunk=64) == expected


def test_logits_are_those_of_transformers(family: str, folder: Path) -> None:
    """Chunk by chunk, three sequences in a batch."""
    model, reference = built(family, folder)
    tokens = [torch.tensor(prompt) for prompt in PROMPTS]
    for found, sequence in zip(serve(model, tokens, 16), tokens, strict=True):
        assert float(row_errors(found, reference.logits(sequence)).max()) < 1e-4


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8", "fp8_e5m2"])
@pytest.mark.parametrize(("name", "fields"), [FAMILIES["doge"], FAMILIES["falcon_alibi"]])
def test_biases_beside_keys_need_a_cache_of_floats(
    name: str, fields: dict[str, Any], kv_cache_dtype: str, tmp_path: Path
) -> None:
    """Also where the graph has been captured for another type."""
    getattr(transformers, name)(**fields).save_pretrained(tmp_path)
    plain = CompileConfig(str(tmp_path), cache_dir=str(tmp_path / "cache"), dtype="float32")
    for _ in range(2):
        with pytest.raises(CaptureError, match="keeps a bias beside each key, .* give --kv-cache-dtype auto"):
            load_or_capture(dataclasses.replace(plain, kv_cache_dtype=kv_cache_dtype))
        assert load_or_capture(plain).has_key_bias


@pytest.mark.parametrize(("family", "most"), [("deepseek_v32", 64), ("doge", 2048), ("llama4", 4096)])
def test_the_context_ends_where_a_key_would_be_left_out(family: str, most: int) -> None:
    name, fields = FAMILIES[family]
    config = getattr(transformers, name)(**fields | dict(max_position_embeddings=4096))
    assert facts_of(config).max_positions == most
    if most < 4096:
        with pytest.raises(LoadError, match=f"chooses {most} keys .* give --max-model-len {most}"):
            model_limit(CompileConfig(model="", max_model_len=most + 1), facts_of(config))
    small = small_config(config, 4)
    assert facts_of(small).max_positions == small.max_position_embeddings <= 128


def test_logits_do_not_depend_on_the_batch(family: str, folder: Path) -> None:
    model, _ = built(family, folder)
    tokens = [torch.tensor(prompt) for prompt in PROMPTS]
    for found, sequence in zip(serve(model, tokens, 16), tokens, strict=True):
        assert torch.equal(found, serve(model, [sequence], 16)[0])
