"""Random checkpoints in the shapes of real models, for speed and memory figures (their text is meaningless).

    python benchmarks/checkpoints.py 135m 135m
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def shapes() -> dict[str, PreTrainedConfig]:
    """Configs by name; sizes as published by the models' authors."""
    return {
        # SmolLM2-135M
        "135m": LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, rope_theta=100000.0,
            tie_word_embeddings=True,
        ),
        # Qwen2.5-0.5B
        "0.5b": Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768, rope_theta=1000000.0,
            tie_word_embeddings=True,
        ),
        # Llama-3.2-1B
        "1b": LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, vocab_size=128256, max_position_embeddings=131072,
            tie_word_embeddings=True, rope_theta=500000.0,
            rope_scaling=dict(
                rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        ),
        # Mamba2-370M
        "mamba2-370m": Mamba2Config(
            hidden_size=1024, num_hidden_layers=48, num_heads=32, head_dim=64, n_groups=1, state_size=128,
            vocab_size=50288, tie_word_embeddings=True,
        ),
        # Granite-4.0-H-350M
        "granite-4.0-h-350m": GraniteMoeHybridConfig(
            hidden_size=768, intermediate_size=2048, shared_intermediate_size=2048, num_hidden_layers=32,
            layer_types=["attention" if k in (10, 13, 17, 27) else "mamba" for k in range(32)], num_local_experts=0,
            num_experts_per_tok=0, num_attention_heads=12, num_key_value_heads=4, mamba_n_heads=48, mamba_d_head=32,
            mamba_n_groups=1, mamba_d_state=128, vocab_size=100352, max_position_embeddings=32768,
            position_embedding_type="nope", tie_word_embeddings=True,
        ),
        # LFM2-350M
        "lfm2-350m": Lfm2Config(
            hidden_size=1024, intermediate_size=6656, num_hidden_layers=16, num_attention_heads=16,
            num_key_value_heads=8, vocab_size=65536, max_position_embeddings=32768, tie_word_embeddings=True,
            layer_types=["full_attention" if k in (2, 5, 8, 10, 12, 14) else "conv" for k in range(16)],
        ),
        # Qwen3.5-0.8B, its text model
        "qwen3.5-0.8b": Qwen3_5TextConfig(
            hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8,
            num_key_value_heads=2, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=16,
            linear_key_head_dim=128, linear_value_head_dim=128, vocab_size=248320, max_position_embeddings=32768,
            tie_word_embeddings=True,
        ),
    }  # fmt: skip


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE with exactly `vocab_size` tokens: bytes, special tokens, then pairs and triples of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    merges: list[tuple[str, str]] = []
    printable = [c for c in alphabet if c.isascii()] + ["Ġ"]
    pairs = ["".join(p) for p in itertools.product(printable, repeat=2)]
    candidates = itertools.chain(
        itertools.product(printable, repeat=2), ((a, b) for a in pairs for b in printable)
    )
    for left, right in candidates:
        if len(vocab) == vocab_size:
            break
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def make_checkpoint(shape: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes the checkpoint unless `folder` already holds one."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = shapes()[shape]
    config.eos_token_id, config.bos_token_id = 2, 0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    make_tokenizer(config.vocab_size).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE,
        "model_max_length": getattr(config, "max_position_embeddings", 32768),
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(shapes()))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    args = parser.parse_args()
    print(make_checkpoint(args.shape, args.folder, getattr(torch, args.dtype)))
