"""Checkpoints of the zoo in every format of weights, each written by the package or the layout that defines it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor

from fuseline.api.config_resolve import resolve
from fuseline.api.save_shards import save_shards

State = dict[str, Tensor]
SHARDED = "model-00001-of-00002"


def write(kind: str, folder: Path, family: str = "llama", dtype: str = "float32") -> Path:
    """The directory of the zoo's model in a format; `kind` is a key of WRITERS."""
    source = zoo.checkpoint(family, dtype)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    WRITERS[kind](folder, load_file(source / "model.safetensors"), source)
    return folder


def _torch(folder: Path, state: State, source: Path) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def _torch_pt(folder: Path, state: State, source: Path) -> None:
    """Two files without an index, and one that is no part of the model."""
    names = sorted(state)
    for part, some in enumerate((names[::2], names[1::2])):
        torch.save({name: state[name] for name in some}, folder / f"weights-{part + 1:05d}-of-00002.pt")
    torch.save({"step": 3}, folder / "optimizer.pt")


def _safetensors(folder: Path, state: State, source: Path) -> None:
    """Files without an index."""
    names = sorted(state)
    for part, some in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in some}, folder / f"shard-{part + 1:05d}-of-00002.safetensors")


def _usual(folder: Path, state: State, source: Path) -> None:
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def _tensorizer(folder: Path, state: State, source: Path) -> None:
    from tensorizer import TensorSerializer

    serializer = TensorSerializer(str(folder / "model.tensors"))
    serializer.write_state_dict(state)
    serializer.close()


def _sharded_state(folder: Path, state: State, source: Path) -> None:
    save_shards(resolve({"model": str(source)}), folder, max_size=60_000)


def _mistral(folder: Path, state: State, source: Path) -> None:
    """Names and order of rows as of mistral-inference, by the inverse of Transformers' conversion script."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    renamed: State = {}
    for name, value in state.items():
        for letter, count in heads.items():
            if f"{letter}_proj" in name:
                value = value.view(count, 2, head_dim // 2, -1).transpose(1, 2).reshape(value.shape)
        renamed[mistral_name(name)] = value.contiguous()
    renamed["vision_encoder.ln_pre.weight"] = torch.ones(3)  # no part of the text model
    save_file(renamed, folder / "consolidated.safetensors")
    params = {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "head_dim": head_dim,
        "hidden_dim": config["intermediate_size"], "n_heads": heads["q"], "n_kv_heads": heads["k"],
        "norm_eps": config["rms_norm_eps"], "vocab_size": config["vocab_size"], "max_seq_len": 256,
        "rope_theta": config["rope_parameters"]["rope_theta"],
    }  # fmt: skip
    if config.get("sliding_window"):
        params["sliding_window"] = config["sliding_window"]
    if config.get("num_local_experts"):
        used = config["num_experts_per_tok"]
        params["moe"] = {"num_experts": config["num_local_experts"], "num_experts_per_tok": used}
    (folder / "params.json").write_text(json.dumps(params))


def mistral_name(name: str) -> str:
    changes = (
        ("model.embed_tokens", "tok_embeddings"), ("model.norm", "norm"), ("lm_head", "output"),
        ("model.layers", "layers"), ("self_attn.o_proj", "attention.wo"), ("self_attn.q_proj", "attention.wq"),
        ("self_attn.k_proj", "attention.wk"), ("self_attn.v_proj", "attention.wv"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"), ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.down_proj", "feed_forward.w2"), ("mlp.up_proj", "feed_forward.w3"),
        ("block_sparse_moe", "feed_forward"),
    )  # fmt: skip
    for old, new in changes:
        name = name.replace(old, new)
    return name


WRITERS: dict[str, Callable[[Path, State, Path], None]] = {
    "pt": _torch, "pt-shards": _torch_pt, "npcache": _torch, "safetensors-shards": _safetensors, "auto": _usual,
    "tensorizer": _tensorizer, "sharded_state": _sharded_state, "mistral": _mistral, "runai_streamer": _usual,
}  # fmt: skip
