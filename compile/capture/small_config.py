"""The config of a model made small: few layers of small width, short windows, everything else as it is.

Rules go by the names of Transformers' configs. Counts of heads shrink by one factor, head dimensions by another and
widths by both, so that ratios stay. Lengths at which a model changes its behavior (windows, chunks, the positions it
was first trained on) shrink so far that a few dozen tokens reach them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd

from transformers import PreTrainedConfig

from fuseline.compile.capture.captured import num_chosen_keys

NUM_SPECIAL = 8
"""Ids of tokens with a meaning are below it."""
LARGEST = {"vocab": 256, "positions": 128, "original": 32, "window": 8}
"""Largest value by kind of setting; `original` is the number of positions that scaled rotary embeddings begin with."""
HEAD_DIM = 16
MIN_EXPERTS = 8
RULES: tuple[tuple[str, str], ...] = (
    ("special", r"_token_id$|_token_index$|^(eos|bos|pad)_index$"),
    ("vocab", r"vocab_size"),
    ("original", r"original_max_position_embeddings|initial_context_length"),
    ("shared_layers", r"^num_kv_shared_layers$"),
    ("layers", r"^(num_hidden_layers|n_layers?|num_layers|num_decoder_layers|decoder_layers)$"),
    ("positions", r"max_position|^n_positions$|^n_ctx$|max_seq_len|max_sequence_length|^seq_length$|model_max_length"
                  r"|max_target_positions|^context_length$|max_inference_chunksize"),
    ("window", r"window(_size|_len)?$|chunk_size|floor(_scale)?$|^local_attention$|rel_extent|index_topk"
               r"|index_block_size|chunk_length$|relative_max_distance"),
    ("experts", r"num_(local_)?experts$|n_routed_experts$|moe_num_primary_experts$"),
    ("head_dim", r"head_?dim$|d_head$|dim_head$|head_size$|kv_channels$|rotary_dim$|pre_attn_scalar$|mrope_section$"),
    ("heads", r"heads?$|query_groups$|n_groups$|num_attention_heads_per_layer$"),
    ("factors", r"^(short|long)_factor$"),
    ("width", r"hidden_size|intermediate_size|d_model$|n_embd$|n_inner$|ffn|_dim$|^dim_ff$|^dff$|_rank$|_width$|d_ssm$"
              r"|emb_dim|embedding_size|feed_forward_size|dim_model_base"),
)  # fmt: skip
"""Kind of a setting by its name; the first match applies."""


@dataclass(frozen=True)
class Shrink:
    """How much smaller the settings of each kind become."""

    num_layers: int
    heads: int
    """Divisor of head counts."""
    head_dim: int
    """Divisor of head dimensions."""
    min_experts: int
    old_layers: int


def small_config(hf_config: PreTrainedConfig, num_layers: int, narrow: bool = True) -> PreTrainedConfig:
    """Returns a copy with the first `num_layers` layers. Not `narrow`: heads and widths stay."""
    small = copy.deepcopy(hf_config)
    shrink = choose_shrink(small.get_text_config(), num_layers, narrow)
    _shrink_config(small, shrink)
    text = small.get_text_config()
    if num_chosen_keys(text):  # as many as it has positions: no sequence is longer
        for name in ("index_topk", "indexer_budget", "keep_window_size"):
            if hasattr(text, name):
                setattr(text, name, LARGEST["positions"])
    return small


def choose_shrink(text: PreTrainedConfig, num_layers: int, narrow: bool) -> Shrink:
    total, heads = _setting(text, "num_hidden_layers") or num_layers, _setting(text, "num_attention_heads") or 1
    heads = heads[0] if isinstance(heads, (list, tuple)) else heads
    head_dim = _setting(text, "head_dim") or (_setting(text, "hidden_size") or 0) // heads
    chosen = [_setting(text, n) for n in ("num_experts_per_tok", "moe_topk", "n_group", "moe_k", "top_k_experts")]
    fewest = max([MIN_EXPERTS, *(2 * value for value in chosen if isinstance(value, int))])
    if not narrow:
        return Shrink(num_layers, 1, 1, fewest, total)
    counts = {v for name, v in vars(text).items() if kind_of(name) == "heads" for v in _ints(v) if v > 1}
    return Shrink(num_layers, _divisor(gcd(*counts), min(counts, default=1)), _dim_divisor(head_dim), fewest, total)


def _setting(config: PreTrainedConfig, name: str) -> object:
    """None where there is no such setting; where each layer has its own, that of the first."""
    try:
        return getattr(config, name, None)
    except Exception:  # the type that Transformers raises for settings of layers is no AttributeError
        return getattr(config.per_layer_config[0], name, None)


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in RULES if re.search(pattern, name)), "")


def _divisor(common: int, fewest: int) -> int:
    """The largest divisor of all counts that leaves two."""
    return max((d for d in range(1, common + 1) if common % d == 0 and fewest // d >= 2), default=1)


def _dim_divisor(head_dim: int) -> int:
    """Down to HEAD_DIM or the smallest even size above it."""
    return max((d for d in range(1, head_dim) if head_dim % (2 * d) == 0 and head_dim // d >= HEAD_DIM), default=1)


def _shrink_config(config: PreTrainedConfig, shrink: Shrink) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _shrink_config(value, shrink)
        elif not name.startswith("_") or name == "_sliding_window":
            smaller = _shrunk(name, value, shrink)
            if smaller != value:
                setattr(config, name, smaller)


def _shrunk(name: str, value: object, shrink: Shrink) -> object:
    if isinstance(value, dict):
        return {key: _shrunk(str(key), item, shrink) for key, item in value.items()}
    kind = kind_of(name)
    if isinstance(value, (list, tuple)):
        if kind == "factors":
            return type(value)(value[:: shrink.head_dim])
        kept = value[: shrink.num_layers] if len(value) == shrink.old_layers else value
        return type(value)(_shrunk(name, item, shrink) if kind else item for item in kept)
    if isinstance(value, bool) or not isinstance(value, int) or not kind:
        return value
    return _shrunk_int(kind, value, shrink)


def _shrunk_int(kind: str, value: int, shrink: Shrink) -> int:
    match kind:
        case "special":
            return value % NUM_SPECIAL
        case "shared_layers":  # the last ones, a few: layers before them must have caches of the same types
            return value * shrink.num_layers // (2 * shrink.old_layers)
        case "layers":
            return min(value, shrink.num_layers)
        case "experts":
            return _halved(value, shrink.min_experts)
        case "heads":
            return value // shrink.heads if value % shrink.heads == 0 else value
        case "head_dim":
            return value // shrink.head_dim if value % shrink.head_dim == 0 else value
    if kind in LARGEST:
        return min(value, LARGEST[kind])
    divisor = shrink.heads * shrink.head_dim
    return value // divisor if value % divisor == 0 else max(min(value, HEAD_DIM), value // divisor // 8 * 8)


def _halved(value: int, fewest: int) -> int:
    while value % 2 == 0 and value // 2 >= fewest:
        value //= 2
    return value


def _ints(value: object) -> Iterable[int]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in items if isinstance(item, int) and not isinstance(item, bool)]
