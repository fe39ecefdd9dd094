"""params.json of Mistral's own checkpoints (mistral-inference) as config.json of Transformers.

https://github.com/mistralai/mistral-inference/blob/main/src/mistral_inference/args.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT_CONTEXT = 128_000
"""As in the reference server, for files that state none."""
RENAMED = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size", "head_dim": "head_dim",
}  # fmt: skip
OPTIONAL = {"sliding_window": "sliding_window", "tied_embeddings": "tie_word_embeddings"}
NEEDED = ("dim", "n_layers", "hidden_dim", "n_heads", "norm_eps", "vocab_size")
REFUSED = {
    "quantization": "quantized weights of this format are not supported; give the checkpoint in Transformers' format",
    "lora": "adapters are not supported",
    "llama_4_scaling": "attention scaled by position is not supported",
    "model_type": "only transformers are supported",
    "q_lora_rank": "latent attention is not supported in this format; give the checkpoint in Transformers' format",
}
"""Keys that say of a model what config.json below does not; other values than null and these are refused."""
HARMLESS = {"model_type": ("transformer",)}
MAX_INT = 2**31


def config_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the text model. Raises ValueError."""
    for key, reason in REFUSED.items():
        if params.get(key) and params[key] not in HARMLESS.get(key, ()):
            raise ValueError(f"{key}: {reason}")
    _check(params)
    found = {"head_dim": params["dim"] // params["n_heads"], "num_key_value_heads": params["n_heads"]}
    found |= {name: params[key] for key, name in RENAMED.items() if params.get(key) is not None}
    found |= {name: params[key] for key, name in OPTIONAL.items() if key in params}
    context = params.get("max_position_embeddings") or params.get("max_seq_len") or DEFAULT_CONTEXT
    found |= {"hidden_act": "silu", "max_position_embeddings": context, "rope_parameters": _rope(params),
              "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16"}  # fmt: skip
    found.setdefault("tie_word_embeddings", False)
    found.setdefault("sliding_window", None)
    moe = params.get("moe")
    if not moe:
        return found | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    experts = {"num_local_experts": moe["num_experts"], "num_experts_per_tok": moe["num_experts_per_tok"]}
    return found | experts | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}


def head_dim_of(params: Mapping[str, Any]) -> int:
    """Raises ValueError."""
    return int(config_of(params)["head_dim"])


def _check(params: Mapping[str, Any]) -> None:
    for key in (*RENAMED, "max_position_embeddings", "max_seq_len", "rope_theta"):
        value = params.get(key)
        if value is None and key not in NEEDED:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_INT
        if not is_number or (key not in ("norm_eps", "rope_theta") and value != int(value)):
            raise ValueError(f"{key} must be a number above 0, and is {value!r}")
    window = params.get("sliding_window")
    if window is not None and not (type(window) is int and window > 0):
        raise ValueError(f"sliding_window must be a number above 0 or null, and is {str(window)[:50]}")
    moe = params.get("moe")
    if moe and not (isinstance(moe, Mapping) and all(type(moe.get(key)) is int for key in MOE_KEYS)):
        raise ValueError(f"moe must be an object with {' and '.join(MOE_KEYS)}")


MOE_KEYS = ("num_experts", "num_experts_per_tok")


def _rope(params: Mapping[str, Any]) -> dict[str, Any]:
    theta = float(params.get("rope_theta") or 10000.0)
    yarn = params.get("yarn")
    if not yarn:
        return {"rope_type": "default", "rope_theta": theta}
    if not isinstance(yarn, Mapping) or not {"factor", "original_max_position_embeddings"} <= set(yarn):
        raise ValueError("yarn must be an object with factor and original_max_position_embeddings")
    fast = {"beta": "beta_fast", "alpha": "beta_slow"}
    found = {"rope_type": "yarn", "rope_theta": theta, "factor": float(yarn["factor"]),
             "original_max_position_embeddings": yarn["original_max_position_embeddings"]}  # fmt: skip
    found |= {name: float(yarn[key]) for key, name in fast.items() if key in yarn}
    if yarn.get("apply_scale") is False:
        found["attention_factor"] = 1.0
    return found
