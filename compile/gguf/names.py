"""Names of the tensors of GGUF files, and what they are in checkpoints of Transformers.

What the converter of llama.cpp (convert_hf_to_gguf.py) changes is changed back: rows of llama's queries and keys are
stored in pairs that rotate together, norms of Gemma with 1 added, experts of a layer as one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
DENSE = ATTENTION | {
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
GEMMA2 = DENSE | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
MIXTRAL = DENSE | {
    "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3", "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}  # fmt: skip
QWEN_MOE = DENSE | {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
PHI3 = DENSE | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
ROTARY = re.compile(r"(blk\.\d+\.)?(rope_freqs|rope_factors_\w+|attn_rot_embd)\.\w+")
"""Tensors that config.py makes settings of."""
IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+?)(?:\.(\d+))?\.(weight|bias)")
OUTSIDE = re.compile(r"(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """A general.architecture of GGUF files."""

    model_type: str
    """Of config.json."""
    layer: Mapping[str, str]
    """Names in a layer; {} is an expert's number."""
    pairs_rows: bool = False
    """Rows 2 j and 2 j + 1 of a head of queries or keys are those that Transformers has at j and j + half a head."""
    adds_one: bool = False
    """Norms are stored with 1 added."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", DENSE, pairs_rows=True),
    "mixtral": Architecture("mixtral", MIXTRAL, pairs_rows=True),
    "qwen2": Architecture("qwen2", DENSE),
    "qwen2moe": Architecture("qwen2_moe", QWEN_MOE),
    "qwen3": Architecture("qwen3", DENSE),
    "qwen3moe": Architecture("qwen3_moe", QWEN_MOE),
    "gemma": Architecture("gemma", DENSE, adds_one=True),
    "gemma2": Architecture("gemma2", GEMMA2, adds_one=True),
    "gemma3": Architecture("gemma3_text", GEMMA2, adds_one=True),
    "phi3": Architecture("phi3", PHI3),
}
"""By general.architecture; that of Mixtral is llama with experts, and is called mixtral here."""


@dataclass(frozen=True)
class Place:
    """A parameter as Transformers' checkpoints name it, and the rows of a stored tensor that hold it."""

    name: str
    shape: tuple[int, ...]
    first_row: int = 0
    paired: bool = False
    """Its rows are those of Architecture.pairs_rows."""
    adds_one: bool = False


@dataclass(frozen=True)
class Heads:
    """Numbers of heads of queries and of keys, and the rows of one."""

    queries: int
    keys: int
    dim: int


def places(architecture: Architecture, heads: Heads, name: str, shape: tuple[int, ...]) -> Iterator[Place]:
    """Where a stored tensor goes; none for those that are settings. Raises KeyError for an unknown name."""
    if ROTARY.fullmatch(name):
        return
    if found := IN_LAYER.fullmatch(name):
        layer, key, expert, suffix = found.groups()
        yield from _in_layer(architecture, heads, (f"model.layers.{layer}.", key, expert or "", suffix), shape)
    elif found := OUTSIDE.fullmatch(name):
        target = f"{WHOLE[found[1]]}.{found[2]}"
        yield Place(target, shape, adds_one=architecture.adds_one and target.endswith("norm.weight"))
    else:
        raise KeyError(name)


def _in_layer(
    architecture: Architecture, heads: Heads, words: tuple[str, str, str, str], shape: tuple[int, ...]
) -> Iterator[Place]:
    """`words`: what comes before the name in a layer, that name, the number of a single expert, weight or bias."""
    before, key, expert, suffix = words
    if expert:
        yield Place(f"{before}{architecture.layer[key + '_exps']}.{suffix}".format(expert), shape)
        return
    for part, first, count in _parts(architecture, heads, key, shape):
        target = f"{before}{architecture.layer[part]}.{suffix}"
        if "{}" in target:
            for index in range(shape[0]):
                yield Place(target.format(index), (count, *shape[2:]), index * shape[1] + first)
            continue
        is_paired = architecture.pairs_rows and part in ("attn_q", "attn_k")
        own = (1, shape[-1]) if part == "ffn_gate_inp_shexp" else (count, *shape[1:])  # its one output is left out
        yield Place(target, own, first, is_paired, architecture.adds_one and target.endswith("norm.weight"))


def _parts(
    architecture: Architecture, heads: Heads, key: str, shape: tuple[int, ...]
) -> Sequence[tuple[str, int, int]]:  # fmt: skip
    """(name, first row, rows) of what a tensor joins, of each expert: the converter joins some if it is asked to."""
    num_rows = shape[1] if len(shape) == 3 else shape[0]
    if key in architecture.layer:
        return ((key, 0, num_rows),)
    if key == "attn_qkv":
        queries, keys = heads.queries * heads.dim, heads.keys * heads.dim
        return ("attn_q", 0, queries), ("attn_k", queries, keys), ("attn_v", queries + keys, keys)
    if key == "ffn_gate_up_exps":
        half = num_rows // 2
        return ("ffn_gate_exps", 0, half), ("ffn_up_exps", half, half)
    raise KeyError(key)
