"""config.json with the overrides of the command line; needs neither torch nor Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONTEXT_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "max_seq_length",
    "seq_len", "n_ctx", "max_target_positions", "model_max_length",
)  # fmt: skip
"""Where config.json states the context length."""
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Where config.json states the number of layers."""


def merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `overrides` in their place; objects are merged key by key, at any depth."""
    result = dict(values)
    for key, value in overrides.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def with_fewer_layers(values: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of one entry a layer, cut to the layers that are left where `values` has fewer than `stored`."""
    result = dict(values)
    for key in LAYER_KEYS:
        count, old = values.get(key), stored.get(key)
        if isinstance(count, int) and isinstance(old, int) and 0 < count < old:
            lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == old}
            result |= {name: value[:count] for name, value in lists.items()}
    for key, value in result.items():
        if isinstance(value, Mapping) and isinstance(stored.get(key), Mapping):
            result[key] = with_fewer_layers(value, stored[key])
    return result


def whole_lengths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Context lengths written as floats (4096.0, 1e5) as the integers that Transformers takes."""
    result = {key: whole_lengths(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key in CONTEXT_KEYS:
        if isinstance(result.get(key), float) and result[key].is_integer():
            result[key] = int(result[key])
    return result
