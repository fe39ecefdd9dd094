"""ModelInfo of a compiled model."""

from __future__ import annotations

import json
from pathlib import Path

from fuseline.compile.config import CompileConfig
from fuseline.compile.specs import CacheGroup, CacheSpec, ModelInfo

DEFAULT_LIMIT = 2048


def model_limit(config: CompileConfig, hf_config) -> int:
    """Context length in tokens: the asked one, else the model's."""
    text = hf_config.get_text_config()
    return config.max_model_len or getattr(text, "max_position_embeddings", None) or DEFAULT_LIMIT


def describe(config: CompileConfig, captured, result, weights, executable) -> ModelInfo:
    text = captured.config.get_text_config()
    specs = result.specs
    return ModelInfo(
        architecture=(captured.config.architectures or [captured.config.model_type])[0],
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        max_model_len=model_limit(config, captured.config),
        dtype=str(captured.dtype).removeprefix("torch."),
        eos_token_ids=eos_ids(config.model, captured.config),
        weight_bytes=sum({t.data_ptr(): t.nbytes for t in weights.values()}.values()),
        arena_bytes=getattr(executable, "arena_bytes", 0),
        rope_switch=captured.rope_switch,
        cache_specs=tuple(spec for spec in specs if isinstance(spec, CacheSpec)),
        cache_groups=tuple(spec for spec in specs if isinstance(spec, CacheGroup)),
    )


def eos_ids(model: str, hf_config) -> tuple[int, ...]:
    """EOS ids of generation_config.json, else of config.json."""
    path = Path(model) / "generation_config.json"
    stored = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    found = stored if stored is not None else hf_config.get_text_config().eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
