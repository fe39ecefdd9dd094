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
FEW_LAYERS = 4
HINTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
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
    """Whether its only use is to generate text from text: no part of an encoder-decoder, no encoder turned around."""
    is_encoder = model_type in getattr(modeling_auto, "MODEL_FOR_MASKED_LM_MAPPING_NAMES", ())
    return not is_encoder and not getattr(config, "is_encoder_decoder", False)
