"""Small configs of models with recurrent states, by family: the name of the config's class and its fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from fuseline.compile.capture.reference import RandomModel

VOCAB = 128
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
    "nemotron_h_experts": ("NemotronHConfig", COMMON | HEADS | EXPERTS | dict(
        layers_block_type=["mamba", "moe", "attention", "mamba"], head_dim=16, mamba_num_heads=8, mamba_head_dim=16,
        n_groups=2, ssm_state_size=12, chunk_size=8, n_routed_experts=4, moe_shared_expert_intermediate_size=32)),
    "bamba": ("BambaConfig", MAMBA2 | dict(attn_layer_indices=[1])),
    "falcon_h1": ("FalconH1Config", MAMBA2 | dict(mamba_d_ssm=128)),
    "jamba": ("JambaConfig", COMMON | HEADS | dict(
        attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2, num_experts=4,
        mamba_d_state=12, mamba_dt_rank=8)),
    "minimax": ("MiniMaxConfig", COMMON | HEADS | dict(
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"], head_dim=16,
        num_local_experts=4, num_experts_per_tok=2, block_size=8)),
    "recurrent_gemma": ("RecurrentGemmaConfig", COMMON | HEADS | dict(lru_width=64, attention_window_size=24)),
    "rwkv": ("RwkvConfig", COMMON | dict(attention_hidden_size=64, context_length=256)),
    "xlstm": ("xLSTMConfig", COMMON | dict(
        num_heads=4, qk_dim_factor=1.0, v_dim_factor=1.0, chunk_size=8, ffn_round_up_to_multiple_of=8)),
    "zaya": ("ZayaConfig", COMMON | HEADS | dict(
        head_dim=16, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=32, router_hidden_size=32, cca_time0=3,
        cca_time1=3, attention_bias=True, tie_word_embeddings=False, num_hidden_layers=3)),
    "inkling": ("InklingTextConfig", COMMON | HEADS | dict(
        head_dim=16, swa_head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=4, sliding_window_size=8,
        rel_extent=12, d_rel=4, local_layer_ids=[0, 2], log_scaling_n_floor=6, moe_intermediate_size=32,
        n_routed_experts=4, num_experts_per_tok=2)),
    "qwen4_exp": ("Qwen4ExpTextConfig", DELTA | EXPERTS | dict(
        shared_expert_intermediate_size=48, hc_lowrank=8, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16,
        indexer_budget=256, indexer_compress_ratio=8)),
    "mamba": ("MambaConfig", COMMON | dict(state_size=12, intermediate_size=96, time_step_rank=8)),
}  # fmt: skip


def save_recurrent(family: str, folder: Path) -> RandomModel:
    """Writes a checkpoint with random weights in float32."""
    name, fields = FAMILIES[family]
    model = RandomModel(getattr(transformers, name)(**fields), False, seed=3)
    model.save(folder)
    return model
