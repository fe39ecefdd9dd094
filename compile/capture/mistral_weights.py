"""Weights of Mistral's own checkpoints: consolidated.safetensors beside params.json, under the names of Transformers.

Rows of a head's queries and keys lie in pairs that rotate together; Transformers has the first of all pairs before the
second ones.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from fuseline.compile.capture.checkpoint import PairedRows, StoredTensor, find_files, read_safetensors
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.mistral_params import head_dim_of
from fuseline.compile.stored_config import PARAMS

FILE = "consolidated.safetensors"
MLP = {"1": "gate", "2": "down", "3": "up"}
EXPERTS = r"(?:feed_forward|block_sparse_moe)"
RULES: tuple[tuple[str, str], ...] = (
    (r"tok_embeddings\.weight", "model.embed_tokens.weight"),
    (r"norm\.weight", "model.norm.weight"),
    (r"output\.weight", "lm_head.weight"),
    (r"layers\.(\d+)\.attention\.w([qkvo])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    *((rf"layers\.(\d+)\.feed_forward\.w{digit}\.weight", rf"model.layers.\1.mlp.{name}_proj.weight")
      for digit, name in MLP.items()),
    (rf"layers\.(\d+)\.{EXPERTS}\.gate\.weight", r"model.layers.\1.block_sparse_moe.gate.weight"),
    (rf"layers\.(\d+)\.{EXPERTS}\.experts\.(\d+)\.w([123])\.weight",
     r"model.layers.\1.block_sparse_moe.experts.\2.w\3.weight"),
)  # fmt: skip
"""Names of the files -> those of Transformers. Others, as of an image encoder, are no part of the text model."""
PAIRED = re.compile(r"\.(q|k)_proj\.(weight|bias)$")


def open_mistral(folder: Path) -> dict[str, StoredTensor]:
    """Raises LoadError."""
    files = find_files(folder, FILE)
    if not files:
        raise LoadError(f"{folder} holds no weights of Mistral's format: no {FILE}, nor a sharded one with its index")
    head_dim = _head_dim(folder / PARAMS)
    found: dict[str, StoredTensor] = {}
    for stored in (tensor for path in files for tensor in read_safetensors(path)):
        name = name_of(stored.name)
        renamed = replace(stored, name=name)
        found[name] = paired(renamed, head_dim) if PAIRED.search(name) else renamed
    return found


def name_of(name: str) -> str:
    """The name in Transformers' checkpoints; the same for a tensor that is none of the text model's."""
    for pattern, target in RULES:
        if match := re.fullmatch(pattern, name):
            return match.expand(target)
    return name


def paired(stored: StoredTensor, head_dim: int) -> PairedRows:
    """Raises LoadError for rows that are no whole heads."""
    if not stored.meta.ndim or head_dim % 2 or stored.meta.shape[0] % head_dim:
        raise LoadError(f"{stored.name} in {stored.path} has shape {list(stored.meta.shape)}, but {PARAMS} makes heads "
                        f"of {head_dim}: they do not belong together")  # fmt: skip
    return PairedRows(stored.name, stored.path, stored.begin, stored.meta, head_dim=head_dim)


def _head_dim(path: Path) -> int:
    try:
        return head_dim_of(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise LoadError(f"{path} is missing: weights of Mistral's format need it") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise LoadError(f"{path} cannot be used: {error}") from error
