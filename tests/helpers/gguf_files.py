"""Files of llama.cpp (GGUF) of the zoo's models, written by the package that defines the format, `gguf`.

Names of tensors are those of the package's own map, blocks those of its own quantizers; what these cannot quantize is
packed here (ggml_pack.py). What the converter of llama.cpp does to values (convert_hf_to_gguf.py) is done here again:
rows of llama's queries and keys in pairs that rotate together, norms of Gemma with 1 added, experts stacked.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ggml_pack
import gguf
import numpy as np
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor

from fuseline.api.config import demo_dir

ARCHITECTURES = {"mixtral": "llama", "mistral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
                 "gemma3_text": "gemma3"}  # fmt: skip
"""general.architecture by model_type, where they differ."""
NORMAL, CONTROL, USER = 1, 3, 4
"""Types of tokens."""
Types = Callable[[str, tuple[int, ...]], str]
"""From the name of a tensor of GGUF and its shape, the name of its type."""


def all_of(kind: str) -> Types:
    """Every matrix of one type, as llama-quantize leaves vectors and routers as they are."""
    def found(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) == 1 or "ffn_gate_inp" in name:
            return "F32"
        return kind if shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0 else "F16"

    return found


def in_turn(*kinds: str) -> Types:
    """Matrices of these types in turn."""
    turn = itertools.cycle(kinds)
    return lambda name, shape: "F32" if len(shape) == 1 else all_of(next(turn))(name, shape)


def checkpoint(
    folder: Path, family: str = "llama", types: Types | None = None, widths: int = 1, shards: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A GGUF file of the zoo's model. `plain` beside it has the values that it stands for, as Transformers reads them.

    `widths`: zeros make every dim so many times as large, with the same results.
    """
    source, plain = zoo.checkpoint(family), folder / "plain"
    shutil.copytree(source, plain)
    state, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    if widths > 1:
        state, config = widened(state, config, widths)
        (plain / "config.json").write_text(json.dumps(config))
    path = folder / f"{family}.gguf"
    values = write(path, state, config, types or all_of("Q8_0"), shards, settings or {})
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    return path if shards == 1 else path.with_stem(f"{family}-00001-of-{shards:05}")


def widened(state: dict[str, Tensor], config: dict[str, Any], times: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of a llama: norms are halved (`times` is 4), for the mean square of a padded row is a quarter."""
    grown = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = config | {key: config[key] * times for key in grown} | {"head_dim": config["head_dim"]}
    config["rms_norm_eps"] = config["rms_norm_eps"] / times
    config["intermediate_size"] = -(-config["intermediate_size"] // 256) * 256
    found = {}
    for name, value in state.items():
        rows, columns = value.shape[0], value.shape[-1]
        kept_rows = rows if "embed_tokens" in name or "lm_head" in name else config["intermediate_size"] if (
            "gate_proj" in name or "up_proj" in name) else rows * times
        width = config["intermediate_size"] if "down_proj" in name else columns * times
        shape = (kept_rows, width) if value.ndim == 2 else (width,)
        found[name] = torch.zeros(shape)
        found[name][tuple(slice(size) for size in value.shape)] = value / (math.sqrt(times) if value.ndim == 1 else 1)
    return found, config


def write(
    path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], types: Types, shards: int,
    settings: Mapping[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    """Writes the file; returns the values that it holds by Transformers' names."""
    kind = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, kind, split_max_tensors=-(-len(state) // shards) if shards > 1 else 0)
    add_settings(writer, config)
    for key, value in settings.items():
        add_setting(writer, key, value)
    values, stacks = {}, {}
    for name, value in state.items():
        own = gguf_name(kind, config["num_hidden_layers"], name)
        expert = re.search(r"experts\.(\d+)\.", name)
        if expert:
            stacks.setdefault(own, []).append((int(expert[1]), name, value))
            continue
        stored = to_gguf(value, name, config, kind)
        data, read = packed(stored, types(own, tuple(stored.shape)))
        writer.add_tensor(own, data[0], raw_dtype=data[1])
        values[name] = from_gguf(read, name, config, kind).to(value.dtype).reshape(value.shape)
    for own, experts in stacks.items():
        experts.sort()
        stacked = torch.stack([value for _, _, value in experts])
        data, read = packed(stacked, types(own, tuple(stacked.shape)))
        writer.add_tensor(own, data[0], raw_dtype=data[1])
        values |= {name: one.contiguous() for (_, name, _), one in zip(experts, read, strict=True)}
    for own, value in rope_tensors(config).items():
        writer.add_tensor(own, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: value.contiguous() for name, value in values.items()}


def packed(value: Tensor, kind: str) -> tuple[tuple[np.ndarray, gguf.GGMLQuantizationType], Tensor]:
    """((what is stored, its type), the values that it stands for)."""
    array, of = value.float().numpy(), gguf.GGMLQuantizationType[kind]
    data = ggml_pack.PACKERS[kind](array) if kind in ggml_pack.PACKERS else gguf.quantize(array, of)
    return (data, of), torch.from_numpy(np.array(gguf.dequantize(data, of))).reshape(value.shape)


def gguf_name(kind: str, num_layers: int, name: str) -> str:
    """By the package's map."""
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == kind)
    stacked = re.sub(r"experts\.\d+\.", "experts.", name)
    found = gguf.get_tensor_name_map(arch, num_layers).get_name(stacked, try_suffixes=(".weight", ".bias"))
    assert found, name
    return found


def is_paired(name: str, kind: str) -> bool:
    return kind == "llama" and ("q_proj" in name or "k_proj" in name)


def to_gguf(value: Tensor, name: str, config: Mapping[str, Any], kind: str) -> Tensor:
    if is_paired(name, kind):
        heads = len(value) // head_dim(config)
        return value.reshape(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return value.float() + 1
    return value.squeeze(0) if "shared_expert_gate" in name else value


def from_gguf(value: Tensor, name: str, config: Mapping[str, Any], kind: str) -> Tensor:
    """The inverse."""
    if is_paired(name, kind):
        heads = len(value) // head_dim(config)
        return value.reshape(heads, -1, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
    return value - 1 if kind.startswith("gemma") and name.endswith("norm.weight") else value


def head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def add_setting(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    by_type = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}  # fmt: skip
    writer.kv_data[0].pop(key, None)
    by_type[type(value)](key, value)


def add_settings(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """As the converter of llama.cpp writes them."""
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config["model_type"] in ("llama", "mistral", "mixtral", "phi3"):
        writer.add_rope_dimension_count(head_dim(config))
    for name, add in (("sliding_window", writer.add_sliding_window), ("num_experts", writer.add_expert_count),
                      ("num_local_experts", writer.add_expert_count),
                      ("num_experts_per_tok", writer.add_expert_used_count),
                      ("moe_intermediate_size", writer.add_expert_feed_forward_length),
                      ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
                      ("final_logit_softcapping", writer.add_final_logit_softcapping)):  # fmt: skip
        if config.get(name) and not (name == "sliding_window" and config["model_type"] == "qwen2"):
            add(config[name])
    if config.get("query_pre_attn_scalar"):
        writer.add_attention_scale(config["query_pre_attn_scalar"] ** -0.5)
    if "norm_topk_prob" in config:
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if config["model_type"] == "gemma3_text":
        pattern = [kind == "sliding_attention" for kind in config["layer_types"]]
        writer.add_array("gemma3.attention.sliding_window_pattern", pattern)
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rope_tensors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Factors of wavelengths, as the converter of llama.cpp computes them."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
                for kind in ("long", "short")}  # fmt: skip
    if rope.get("rope_type") != "llama3":
        return {}
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    original, factors = rope["original_max_position_embeddings"], []
    for index in range(0, head_dim(config), 2):
        length = 2 * math.pi * rope["rope_theta"] ** (index / head_dim(config))
        smooth = (original / length - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if length < original / high else factor if length > original / low else between)
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def demo(path: Path, types: Types) -> Path:
    """The model that ships with fuseline, with its tokenizer and chat template, in a GGUF file."""
    source = demo_dir()
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    config = json.loads((source / "config.json").read_text())
    added = {one["content"]: one for one in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | {token: one["id"] for token, one in added.items()}
    tokens = sorted(ids, key=ids.__getitem__)
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    kinds = [NORMAL if token not in added else CONTROL if added[token]["special"] else USER for token in tokens]
    own = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": config["eos_token_id"], "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.padding_token_id": config["pad_token_id"], "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": settings["chat_template"],
    }  # fmt: skip
    write(path, load_file(source / "model.safetensors"), config, types, 1, own)
    return path
