"""Tiny trained checkpoints, one a family of architectures, and what Transformers itself generates from them.

Random weights have near-ties at the top of their logits: a rounding difference flips a token, and comparing tokens is
not honest. These models have learned, in seconds, a few texts by heart: random words, each of which stands before many
others, so that only attention to what came before tells the next. Prompts are beginnings of the texts; the margins
there are wide and the continuations diverse (tests/test_zoo.py holds both).

    path = checkpoint("qwen3", "bfloat16")
    expected = truth(path, PROMPTS, 24)
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

RECIPE = 1  # raise when the way of training changes: it is part of the key of the cache
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "zoo"
VOCAB = 128
NUM_TEXTS, TEXT_LENGTH = 6, 144
SHORT = 64  # every other step sees only beginnings: rotary embeddings that change with the length learn both forms

COMMON: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCAB, max_position_embeddings=256, initializer_range=0.1,
)  # fmt: skip
MOE: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
IDS: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
LONG_FACTORS = [1.0, 1.1, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0]


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


class Family(NamedTuple):
    config_class: str
    fields: dict[str, Any]
    steps: int = 120


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", COMMON),
    "llama3_rope": Family("LlamaConfig", COMMON | rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)),
    "llama_yarn": Family("LlamaConfig", COMMON | rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "mistral": Family("MistralConfig", COMMON | dict(head_dim=16, sliding_window=8)),
    "qwen2": Family("Qwen2Config", COMMON),
    "qwen3": Family("Qwen3Config", COMMON | dict(head_dim=16)),
    "gemma2": Family("Gemma2Config", COMMON | dict(head_dim=16, sliding_window=8)),
    "gemma3": Family("Gemma3TextConfig", COMMON | dict(
        head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "phi3": Family("Phi3Config", COMMON),
    "phi3_longrope": Family("Phi3Config", COMMON | dict(original_max_position_embeddings=64) | rope(
        "longrope", short_factor=[1.0] * 8, long_factor=LONG_FACTORS, original_max_position_embeddings=64)),
    "gpt2": Family("GPT2Config", dict(
        n_embd=64, n_layer=3, n_head=4, vocab_size=VOCAB, n_positions=256, initializer_range=0.1)),
    "gpt_neox": Family("GPTNeoXConfig", COMMON),
    "opt": Family("OPTConfig", COMMON | dict(ffn_dim=96, word_embed_proj_dim=64, init_std=0.1)),
    "starcoder2": Family("Starcoder2Config", COMMON),
    "granite": Family("GraniteConfig", COMMON),
    "mixtral": Family("MixtralConfig", COMMON | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": Family("Qwen3MoeConfig", COMMON | MOE | dict(head_dim=16)),
    "gpt_oss": Family("GptOssConfig", COMMON | dict(
        num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=8)),
    "deepseek_v3": Family("DeepseekV3Config", COMMON | dict(
        num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, q_lora_rank=32,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_group=2,
        topk_group=1, first_k_dense_replace=1)),
    "deepseek_v2": Family("DeepseekV2Config", COMMON | dict(
        num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, q_lora_rank=None,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=24, n_group=4, topk_group=2,
        topk_method="group_limited_greedy", first_k_dense_replace=1)),
    "glm4_moe_lite": Family("Glm4MoeLiteConfig", COMMON | dict(
        num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, q_lora_rank=32,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=24, v_head_dim=32, n_group=1, topk_group=1)),
    # Not in the list of what is supported by name: the general path takes them.
    "phi": Family("PhiConfig", COMMON),
    "cohere": Family("CohereConfig", COMMON | dict(logit_scale=0.5), 200),
    "olmo2": Family("Olmo2Config", COMMON),
    "glm4": Family("Glm4Config", COMMON | dict(head_dim=16)),
    "stablelm": Family("StableLmConfig", COMMON),
    "gemma": Family("GemmaConfig", COMMON | dict(head_dim=16)),
    "qwen2_moe": Family("Qwen2MoeConfig", COMMON | MOE | dict(shared_expert_intermediate_size=48)),
}  # fmt: skip
REFUSED: dict[str, Family] = {
    "roformer": Family("RoFormerConfig", dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=VOCAB), 0),
}  # fmt: skip


def texts() -> torch.Tensor:
    """Texts that every model knows by heart: [NUM_TEXTS, TEXT_LENGTH] token ids, all first tokens different."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(VOCAB, (NUM_TEXTS, TEXT_LENGTH), generator=generator)
    tokens[:, 0] = torch.randperm(VOCAB, generator=generator)[:NUM_TEXTS]
    return tokens


def make_prompts(lengths: Sequence[int]) -> list[list[int]]:
    """The beginning of the i-th text (in rotation) for the i-th length; length + tokens to generate <= TEXT_LENGTH."""
    return [texts()[i % NUM_TEXTS, :length].tolist() for i, length in enumerate(lengths)]


PROMPTS = make_prompts((7, 16, 33, 50, 90))  # 50 and 24 more cross the original length of phi3_longrope


def config_of(family: str) -> PretrainedConfig:
    entry = FAMILIES.get(family) or REFUSED[family]
    return getattr(transformers, entry.config_class)(**entry.fields, **IDS)


def checkpoint(family: str, dtype: str = "float32", cache_root: Path | None = None) -> Path:
    """Directory of the trained checkpoint (config, safetensors, tokenizer); built on first use, then cached.

    family: a key of FAMILIES, or of REFUSED (saved untrained); dtype: "float32", or another into which the trained
    weights are cast. Safe when several processes ask at once.
    """
    key = json.dumps(
        [config_of(family).to_json_string(), FAMILIES.get(family), RECIPE, torch.__version__, transformers.__version__]
    )
    root = cache_root or CACHE
    path = root / f"{family}-{dtype}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    root.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_dir():
            build = (
                (lambda: train(family)) if dtype == "float32" else (lambda: load(checkpoint(family, "float32", root)))
            )
            publish(build, getattr(torch, dtype), path)
    return path


def publish(build: Callable[[], PreTrainedModel], dtype: torch.dtype, path: Path) -> None:
    """Save into a folder beside it, then rename: a folder of the final name is complete."""
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        model = build().to(dtype)
        model.config.dtype = dtype
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder, save_jinja_files=False)
        os.rename(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Token i is the word `w<i>`; an unknown word is w0."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, model_max_length=256)


def train(family: str) -> PreTrainedModel:
    """Brief and deterministic: the whole texts and their beginnings, in turn."""
    entry, threads = FAMILIES.get(family) or REFUSED[family], torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(
            config_of(family), attn_implementation="eager", dtype=torch.float32
        ).train()
        prepare_positions(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)
        for step in range(entry.steps):
            optimizer.param_groups[0]["lr"] = 6e-3 * min(1.0, (step + 1) / 10, 1.2 * (entry.steps - step) / entry.steps)
            tokens = texts()[:, : TEXT_LENGTH if step % 2 else SHORT]
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    torch.set_num_threads(threads)
    return model.eval()


def prepare_positions(model: PreTrainedModel) -> None:
    """Learned position embeddings begin as sines, from which a distance can be read; learning them takes far longer."""
    for name, param in model.named_parameters():
        if "wpe" in name or "embed_positions" in name:
            rows, width = param.shape
            angles = torch.arange(rows)[:, None] / 200.0 ** (torch.arange(width // 2)[None] / (width // 2))
            param.data.copy_(torch.cat([angles.sin(), angles.cos()], dim=1) * 0.3)


def load(path: Path) -> PreTrainedModel:
    """The model as Transformers runs it, eager, in the dtype of the checkpoint."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype="auto").eval()


@torch.no_grad()
def truth(path: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Transformers' own greedy continuations, one prompt at a time; num_tokens each, no end token."""
    model = load(path)
    return [continue_greedily(model, prompt, num_tokens)[0] for prompt in prompts]


@torch.no_grad()
def continue_greedily(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """(tokens, at each the distance of the two highest logits)."""
    out = model.generate(
        torch.tensor([list(prompt)]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=num_tokens, min_new_tokens=num_tokens, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = [logits[0].float().topk(2).values for logits in out.logits]
    return out.sequences[0, len(prompt) :].tolist(), [(first - second).item() for first, second in best]
