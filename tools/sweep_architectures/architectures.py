"""Which architectures there are, and a small config of each: its own default made small, or with hints."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fuseline.compile.capture.hf_model import build_on_meta
from fuseline.compile.capture.repeat import num_distinct_layers
from fuseline.compile.capture.small_config import small_config

MAPPINGS = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",)
"""Transformers' tables of the architectures to try."""
OTHER_MAPPINGS = (
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
)  # fmt: skip
"""Tables of encoders, encoder-decoders and models of sound, whose parts have a causal language model too."""
OTHERS = {
    "cpmant": "each token of a prompt attends to all others, later ones too, so that a longer prompt changes them all",
    "trocr": "the decoder of an encoder-decoder that reads images",
    "xlnet": "attends in both directions: it predicts tokens at places that it is told, in any order",
}
"""Types that no table tells, and why they are no text decoders."""
FEW_LAYERS = 4
SMALL_PART = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
}  # fmt: skip
HINTS: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 512, "global_config": SMALL_PART | {"hidden_size": 128},
        "encoder_config": SMALL_PART, "decoder_config": SMALL_PART, "patcher_config": SMALL_PART,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 32, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "dots3_note": {"vision_config": {"hidden_size": 8192, "adapter_in_dim": 8192, "num_attention_heads": 2}},
    "emu3": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5}},
    "hrm_text": {"num_hidden_layers": 2, "L_cycles": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds": False, "is_decoder": True},
}
"""Settings for types whose default config Transformers itself cannot build, or which is no decoder. A type that the
installed Transformers does not have is ignored."""

LAYERS = {"zamba": 8, "zamba2": 13}
"""Layers for types of which the first few are no model, because some share their weights, and all are too many."""


def all_types() -> list[str]:
    return sorted({name for mapping in MAPPINGS for name in getattr(modeling_auto, mapping, ())})


def small_default(model_type: str) -> PreTrainedConfig:
    """The type's default config, as a decoder, made small. Raises whatever Transformers raises."""
    config = CONFIG_MAPPING[model_type](**HINTS.get(model_type, {}))
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True
    try:
        layers = num_distinct_layers(build_on_meta(config, torch.float32, False))
    except Exception:  # whatever fuseline refuses is told when it is served
        layers = FEW_LAYERS
    return small_config(config, LAYERS.get(model_type, layers))


def is_text_decoder(model_type: str, config: PreTrainedConfig) -> bool:
    """Whether it generates text alone, token by token: no part of an encoder-decoder, no encoder turned around.

    The auto classes tell: those that fill masks, translate, or read and make sound.
    """
    is_other = any(model_type in getattr(modeling_auto, mapping, ()) for mapping in OTHER_MAPPINGS)
    return not is_other and model_type not in OTHERS and not getattr(config, "is_encoder_decoder", False)
