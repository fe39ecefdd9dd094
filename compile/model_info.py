"""ModelInfo of a compiled model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fuseline.compile.capture.captured import ModelFacts
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph_inputs import cache_name, cache_names, state_name
from fuseline.compile.specs import CacheGroup, CacheSpec, FeedSpec, ModelInfo, QuantizedSpec, StateSpec, TapSpec

DEFAULT_LIMIT = 2048


def model_limit(config: CompileConfig, facts: ModelFacts) -> int:
    """Context length in tokens: the requested one, else the model's. Raises LoadError."""
    limit, most = config.max_model_len or facts.max_positions or DEFAULT_LIMIT, facts.num_chosen_keys
    if most and limit > most:
        raise LoadError(
            f"{facts.model_type} chooses {most} keys of longer sequences, which is not supported: "
            f"give --max-model-len {most}"
        )
    return limit


def describe(config: CompileConfig, captured, result, weights, executable) -> ModelInfo:
    facts, specs = captured.facts, result.specs
    return ModelInfo(
        architecture=facts.architecture,
        vocab_size=facts.vocab_size,
        hidden_size=facts.hidden_size,
        num_layers=facts.num_layers,
        max_model_len=model_limit(config, facts),
        dtype=str(captured.dtype).removeprefix("torch."),
        eos_token_ids=eos_ids(config.config_dir, facts),
        weight_bytes=sum({t.data_ptr(): t.nbytes for t in weights.values()}.values()),
        arena_bytes=getattr(executable, "arena_bytes", 0),
        host_weight_bytes=getattr(executable, "host_weight_bytes", 0),
        max_logits=config.max_num_seqs,
        rope_switch=captured.rope_switch,
        cache_specs=tuple(spec for spec in specs if isinstance(spec, CacheSpec)),
        cache_groups=tuple(spec for spec in specs if isinstance(spec, CacheGroup)),
        state_specs=tuple(spec for spec in specs if isinstance(spec, StateSpec)),
        embed_dim=next((spec.embed_dim for spec in specs if isinstance(spec, FeedSpec)), 0),
        quantized=next((spec.weights for spec in specs if isinstance(spec, QuantizedSpec)), ()),
        hidden_dim=next((spec.hidden_dim for spec in specs if isinstance(spec, TapSpec)), 0),
    )


def eos_ids(folder: str, facts: ModelFacts) -> tuple[int, ...]:
    """EOS ids of generation_config.json, else of config.json. Raises LoadError for a broken file."""
    path = Path(folder) / "generation_config.json"
    try:
        values = json.loads(path.read_text()) if path.is_file() else {}
    except (ValueError, OSError) as error:
        raise LoadError(f"{path} is no valid JSON ({error}): get the file again or remove it") from error
    stored = values.get("eos_token_id") if isinstance(values, dict) else values
    if stored is None:
        return facts.eos_token_ids
    ids = stored if isinstance(stored, list) else [stored]
    if not isinstance(values, dict) or not all(type(token) is int for token in ids):
        raise LoadError(f"{path}: eos_token_id must be a token id or a list of them: get the file again or remove it")
    return tuple(ids)


def cache_tensors(
    info: ModelInfo, num_blocks: Sequence[int], block_size: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each layer's caches by placeholder name; `num_blocks` per cache group."""
    groups = zip(info.cache_groups, num_blocks, strict=True)
    of_layer = {layer: count for group, count in groups for layer in group.layers}
    return {
        cache_name(kind, spec.layer): (
            (of_layer[spec.layer], spec.num_kv_heads, block_size, spec.columns(dim)), getattr(torch, spec.dtype)
        )
        for spec in info.cache_specs
        for kind, dim in spec.dims.items()
    }  # fmt: skip


def state_tensors(info: ModelInfo, num_slots: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the recurrent states by placeholder name."""
    return {state_name(s.number): ((num_slots, *s.shape), getattr(torch, s.dtype)) for s in info.state_specs}


def copy_state_slots(caches: Mapping[str, Tensor], info: ModelInfo, pairs: np.ndarray) -> None:
    """Copies recurrent states between slots; `pairs` [2, N] int64: sources, all read before any is written, targets."""
    states = [caches[name] for name in state_tensors(info, 0)]
    device = states[0].device
    if device.type == "cpu" and not np.isin(*pairs).any():
        # A third of the time of the copies below, which go through memory of their own.
        for state in states:
            for source, target in pairs.T.tolist():
                state[target].copy_(state[source])
        return
    sources, targets = (torch.from_numpy(np.ascontiguousarray(side)).to(device) for side in pairs)
    for state in states:
        state.index_copy_(0, targets, state.index_select(0, sources))


def copy_cache_blocks(caches: Mapping[str, Tensor], info: ModelInfo, pairs: Sequence[np.ndarray]) -> None:
    """Copies blocks within each layer's caches; `pairs` [2, N] int64 per cache group: sources and targets."""
    for group, found in zip(info.cache_groups, pairs, strict=True):
        names = cache_names(group, caches) if found.size else []
        if names:
            device = caches[names[0]].device
            sources, targets = (torch.from_numpy(np.ascontiguousarray(side)).to(device) for side in found)
        for name in names:
            cache = caches[name].view(torch.uint8) if caches[name].itemsize == 1 else caches[name]
            cache.index_copy_(0, targets, cache.index_select(0, sources))
