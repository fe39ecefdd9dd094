"""A captured model as a plain value; what reads it needs none of Transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fuseline.compile.specs import RopeSwitchSpec

MIN_TOKENS, MAX_TOKENS = 2, 1 << 20
EXAMPLE_TOKENS = 13
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelFacts:
    """Model properties besides the graph: the config.json values that are used after capture."""

    model_type: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    """Context length; 0 when the config states none."""
    eos_token_ids: tuple[int, ...]
    initializer_range: float
    """Standard deviation of dummy weights; 0 when the config states none."""
    num_chosen_keys: int = 0
    """Keys that a query chooses among all: no sequence has more, so that all are seen. 0: queries do not choose."""


@dataclass
class CapturedModel:
    """Weights are not in memory."""

    graph: fx.GraphModule
    """token_ids[1, T], positions[1, T] -> logits[1, T, V]; parameters are get_attr nodes with meta['fqn']."""
    facts: ModelFacts
    dtype: torch.dtype
    parameters: dict[str, tuple[tuple[int, ...], torch.dtype]]
    constants: dict[str, Tensor] = field(default_factory=dict)
    """Buffers with values, by name."""
    tied: dict[str, str] = field(default_factory=dict)
    """Parameter -> the one it shares memory with."""
    rope_switch: RopeSwitchSpec | None = None
    """When set, `positions` are rope rows."""
    num_distinct_layers: int = 0
    """So many layers from the first on hold one of each kind."""
    has_key_bias: bool = False
    """Whether a bias is kept beside each key in the cache."""
    verdict: str = ""
    """How the serving graph compares with Transformers (compile/check.py); empty if it was not compared."""
    checked_by: str = ""
    """`sources_key` of the compiler that gave the verdict."""


def facts_of(hf_config: object) -> ModelFacts:
    """Return the model facts of a transformers.PreTrainedConfig."""
    text = hf_config.get_text_config()
    eos = next((found for one in (text, hf_config) if (found := getattr(one, "eos_token_id", None)) is not None), None)
    return ModelFacts(
        model_type=hf_config.model_type,
        architecture=(hf_config.architectures or [hf_config.model_type])[0],
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        max_positions=_max_positions(text),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),),
        initializer_range=float(getattr(text, "initializer_range", None) or 0.0),
        num_chosen_keys=num_chosen_keys(text),
    )


def _max_positions(text: object) -> int:
    """Where queries choose among keys, all are seen: sequences are as long as none would be left out."""
    limits = getattr(text, "max_position_embeddings", None), num_chosen_keys(text)
    return min((limit for limit in limits if limit), default=0)


def num_chosen_keys(text: object) -> int:
    """Keys that a query sees at most, those that it chooses among all; 0 where it sees all."""
    is_indexed = "indexed_attention" in (getattr(text, "layer_types", None) or ())
    names = ("index_topk", "indexer_budget") if is_indexed else ("keep_window_size",)
    return next(filter(None, (getattr(text, name, None) for name in names)), 0)
