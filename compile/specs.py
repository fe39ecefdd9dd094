"""Results of passes for the layers above and the weight loader: plain frozen values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

FP8_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""Element types of fp8 caches, by kv_cache_dtype."""
SCALE_BYTES = 4
"""Of the float32 that each token and head of an int8 cache has behind its numbers."""


def is_coded(dtype: str) -> bool:
    """Whether a cache of that element type holds codes, of a byte each."""
    return dtype == "int8" or dtype in FP8_DTYPES.values()


@dataclass(frozen=True)
class CacheSpec:
    """KV memory one attention layer needs.

    K is stored as [num_blocks, num_kv_heads, block_size, columns(key_dim)], V likewise with value_dim. A layer of
    latents, whose values are the first numbers of its keys, has a value_dim of 0.
    """

    layer: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    window: int = 0
    """Tokens a query sees, itself included; 0 means all before it."""

    @property
    def has_scales(self) -> bool:
        """Whether one scale serves all keys of the layer, and one all values."""
        return self.dtype in FP8_DTYPES.values()

    def columns(self, dim: int) -> int:
        """Elements that `dim` numbers of a token and head take, with their scale."""
        return dim + (SCALE_BYTES if self.dtype == "int8" and dim else 0)

    @property
    def dims(self) -> dict[str, int]:
        """Numbers of a token and head in each cache that the layer has: k and v, or k alone."""
        return {"k": self.key_dim, "v": self.value_dim} if self.value_dim else {"k": self.key_dim}

    def bytes_per_token(self) -> int:
        size = 1 if is_coded(self.dtype) else 4 if self.dtype == "float32" else 2
        return self.num_kv_heads * (self.columns(self.key_dim) + self.columns(self.value_dim)) * size


@dataclass(frozen=True)
class StateSpec:
    """Recurrent state that one op keeps for a sequence; its size does not depend on the sequence's length."""

    number: int
    """In the order of the graph: a layer may have several."""
    shape: tuple[int, ...]
    dtype: str

    def bytes_per_sequence(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 2)


@dataclass(frozen=True)
class TapSpec:
    """The graph gives the final hidden states [R, hidden_dim] beside the logits."""

    hidden_dim: int


@dataclass(frozen=True)
class FeedSpec:
    """The graph takes embeddings [E, embed_dim] of some positions."""

    embed_dim: int


@dataclass(frozen=True)
class QuantizedSpec:
    """How the model's quantized weights are kept, in words: 84 as int4/32/float16."""

    weights: tuple[str, ...]


def scale_names(layer: int) -> tuple[str, str]:
    """Constants with the scales of a layer's keys and values in fp8 caches."""
    return f"k_scale_{layer}", f"v_scale_{layer}"


@dataclass(frozen=True)
class CacheGroup:
    """Layers with the same window, which share one block table. Group g of a batch is row g of its tables."""

    window: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class RopeSwitchSpec:
    """The rope table depends on the sequence's length (longrope).

    A sequence of more than `threshold` tokens uses table 1 for all its positions, else table 0. When it crosses the
    threshold, its KV must be recomputed. Row of the stacked table: variant * table_rows + position.
    """

    threshold: int
    table_rows: int


@dataclass(frozen=True)
class WeightSource:
    """How one constant of the lowered graph is made from the checkpoint.

    `names` are parameter names of the Transformers module; several are concatenated along dim 0 in that order.
    """

    names: tuple[str, ...]
    transpose: bool = False
    """Transpose the last two dims of each part first (GPT-2's Conv1D keeps [in, out])."""
    format: str = "rows"
    """Name of the storage format (compile/formats)."""
    dtype: str = ""
    """Element type to store; empty keeps the model's."""
    pads: tuple[int, ...] = ()
    """Rows of zeros for an absent part (a missing bias in a joined linear): pads[i] > 0 replaces names[i]."""
    part: str = ""
    """Name of the format's stored tensor that the constant holds."""
    heads: tuple[int, ...] = ()
    """(number of heads, begin, end): rows [begin, end) of each head's, of the one tensor, as [heads, rows, inputs]."""
    shape: tuple[int, ...] = ()
    """Shape in which the one tensor is read (a convolution by groups as a matrix of each); empty: its own."""


@dataclass(frozen=True)
class ModelInfo:
    """Facts of the compiled model that the engine and the API need."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    weight_bytes: int
    """Bytes of weights on the device."""
    arena_bytes: int
    rope_switch: RopeSwitchSpec | None = None
    cache_specs: tuple[CacheSpec, ...] = ()
    cache_groups: tuple[CacheGroup, ...] = field(default=())
    state_specs: tuple[StateSpec, ...] = ()
    embed_dim: int = 0
    """Features of the embeddings that StepInputs may contain; 0: they may not."""
    hidden_dim: int = 0
    """Features of the hidden states in StepOutput; 0: there are none."""
    host_weight_bytes: int = 0
    """Bytes of weights that are copied to the device in each step."""
    quantized: tuple[str, ...] = ()
    """How quantized weights are kept, in words."""
    max_logits: int = 0
    """Rows of logits that a step has memory for; 0: any number."""
