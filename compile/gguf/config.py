"""Settings of a GGUF file as config.json and generation_config.json of Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuseline.compile.gguf.block_types import BLOCK_TYPES, PLAIN
from fuseline.compile.gguf.header import GgufError, Header
from fuseline.compile.gguf.names import ARCHITECTURES, Architecture
from fuseline.compile.gguf.rope import rope_parameters
from fuseline.compile.gguf.settings import Settings

CONTROL = 3
"""Type of tokens that are no text."""
END_TOKENS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>",
    "<|eot|>", "<|eom|>", "<EOT>", "_<EOT>", "<|end_of_turn|>", "<|return|>", "<|call|>", "[EOT]", "[EOS]",
}  # fmt: skip
"""Control tokens that end an answer whatever the file says, as in llama.cpp."""
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "penalty_repeat": "repetition_penalty"}  # fmt: skip
"""general.sampling.* and their names in generation_config.json."""
LARGE_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the model of 27B, whose queries are scaled by another size than that of a head."""


def architecture_of(header: Header) -> Architecture:
    """Raises GgufError for one that is not known here."""
    name = header.settings.get("general.architecture")
    if name == "llama" and header.settings.get("llama.expert_count"):
        name = "mixtral"
    if name not in ARCHITECTURES:
        raise GgufError(f"its general.architecture {name!r} is not supported in GGUF files; supported are "
                        f"{', '.join(sorted(ARCHITECTURES))}")  # fmt: skip
    return ARCHITECTURES[name]


def model_config(header: Header) -> dict[str, Any]:
    """config.json. Raises GgufError for settings that are missing or of no model that is known here."""
    architecture = architecture_of(header)
    key = Settings(header.settings)
    if "token_embd.weight" not in header.tensors:
        raise GgufError("it has no tensor token_embd.weight: get the file again")
    vocab_size, hidden_size = header.tensors["token_embd.weight"].shape
    heads = key.number("attention.head_count")
    head_dim = key.number("attention.key_length", hidden_size // heads)
    values = {
        "model_type": architecture.model_type, "vocab_size": vocab_size, "hidden_size": key.number("embedding_length"),
        "num_hidden_layers": key.number("block_count"), "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": key.number("attention.head_count_kv", heads),
        "intermediate_size": key.number("feed_forward_length", 0),
        "rms_norm_eps": key.number("attention.layer_norm_rms_epsilon", 1e-6),
        "max_position_embeddings": key.number("context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors, "dtype": dtype_of(header),
        "rope_parameters": rope_parameters(header, head_dim),
        "bos_token_id": key.token("bos"), "eos_token_id": key.token("eos"), "pad_token_id": key.token("padding"),
    }  # fmt: skip
    if key.number("attention.value_length", head_dim) != head_dim:
        raise GgufError("its heads have keys and values of different sizes, which is not supported in GGUF files")
    return values | OWN.get(architecture.model_type, _nothing)(header, key, values)


def generation_config(header: Header) -> dict[str, Any]:
    """generation_config.json: tokens that end an answer, and how the file wants tokens to be sampled."""
    key = Settings(header.settings)
    ends = [key.token(name) for name in ("eos", "eot", "eom")]
    tokens, types = (header.settings.get(f"tokenizer.ggml.{name}") or () for name in ("tokens", "token_type"))
    ends += [index for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
             if kind == CONTROL and token in END_TOKENS]  # fmt: skip
    found = {"bos_token_id": key.token("bos"), "eos_token_id": list(dict.fromkeys(e for e in ends if e is not None))}
    found |= {name: header.settings.get(f"general.sampling.{own}") for own, name in SAMPLING.items()}
    return {name: value for name, value in found.items() if value is not None and value != []}


def dtype_of(header: Header) -> str:
    """What the model computes in: the type of its plain matrices; bfloat16 where there are quantized ones."""
    names = {BLOCK_TYPES[tensor.type_id].name for tensor in header.tensors.values() if len(tensor.shape) > 1}
    if is_quantized(header) or not names:
        return "bfloat16"
    return PLAIN["BF16"] if "BF16" in names else PLAIN["F16"] if "F16" in names else PLAIN["F32"]


def is_quantized(header: Header) -> bool:
    return any(BLOCK_TYPES[tensor.type_id].name not in PLAIN for tensor in header.tensors.values())


def _nothing(header: Header, key: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _llama(header: Header, key: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    """Mistral is a llama, with a window where it has one."""
    if window := key.number("attention.sliding_window", 0):
        return {"model_type": "mistral", "sliding_window": window}
    return {
        "attention_bias": "blk.0.attn_q.bias" in header.tensors, "mlp_bias": "blk.0.ffn_up.bias" in header.tensors
    }  # fmt: skip


def _mixtral(header: Header, key: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_local_experts": key.number("expert_count"), "num_experts_per_tok": key.number("expert_used_count")}


def _qwen3(header: Header, key: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in header.tensors}


def _qwen_moe(header: Header, key: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen3 divides the weights of a token's experts by their sum, Qwen2 does not, unless a file says otherwise."""
    width = key.number("expert_feed_forward_length", header.tensors["blk.0.ffn_down_exps.weight"].shape[-1])
    divides = key.number("expert_weights_norm", values["model_type"] == "qwen3_moe")
    own = {
        "num_experts": key.number("expert_count"), "num_experts_per_tok": key.number("expert_used_count"),
        "moe_intermediate_size": width, "norm_topk_prob": bool(divides),
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    shared = header.tensors.get("blk.0.ffn_down_shexp.weight")
    return own | ({"shared_expert_intermediate_size": shared.shape[-1]} if shared else {})


def _phi3(header: Header, key: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    rope = values["rope_parameters"]
    original = rope.get("original_max_position_embeddings", values["max_position_embeddings"])
    window = key.number("attention.sliding_window", 0)
    return {"original_max_position_embeddings": original, "sliding_window": window or None}


def _gemma2(header: Header, key: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": key.number("attention.sliding_window", 4096),
        "attn_logit_softcapping": key.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": key.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scale("gemma2", key, values),
    }  # fmt: skip


def _gemma3(header: Header, key: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    pattern = header.settings.get("gemma3.attention.sliding_window_pattern", 6)
    layers = range(values["num_hidden_layers"])
    slides = pattern if isinstance(pattern, list) else [(layer + 1) % pattern != 0 for layer in layers]
    theta = key.number("rope.freq_base_swa", 10000.0)
    local = {"rope_type": "default", "rope_theta": theta}
    return {
        "sliding_window": key.number("attention.sliding_window", 4096),
        "layer_types": ["sliding_attention" if slides[layer] else "full_attention" for layer in layers],
        "final_logit_softcapping": key.number("final_logit_softcapping", 0.0) or None,
        "query_pre_attn_scalar": _query_scale("gemma3", key, values),
        "rope_parameters": {"full_attention": values["rope_parameters"], "sliding_attention": local},
    }  # fmt: skip


def _query_scale(name: str, key: Settings, values: Mapping[str, Any]) -> int:
    """The size whose root divides products of queries and keys."""
    if scale := key.number("attention.scale", 0.0):
        return round(scale**-2)
    is_large = values["num_hidden_layers"] == LARGE_GEMMA[name]
    return values["hidden_size"] // values["num_attention_heads"] if is_large else values["head_dim"]


OWN = {
    "llama": _llama, "mixtral": _mixtral, "qwen3": _qwen3, "qwen2_moe": _qwen_moe, "qwen3_moe": _qwen_moe,
    "phi3": _phi3, "gemma2": _gemma2, "gemma3_text": _gemma3,
}  # fmt: skip
"""By model_type: what config.json has besides."""
