"""The tokenizer of a model in GGUF files, which hold its vocabulary and merges: made by Transformers, then mended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fuseline.compile.gguf.table import source_of

WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
"""Kinds of tokenizer.ggml.pre that take a word of the vocabulary as it is, even where no merges lead to it."""
BEGINS = WHOLE_WORDS
"""Kinds that begin each text with a token of its own, where a file does not say."""
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
"""Kinds that part digits, and then words as GPT-2 does."""
LIKE_GPT2 = {None, "", "default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "roberta-bpe",
             "mellum", "modern-bert", "a.x-4.0", "gigachat"}  # fmt: skip
LIKE_QWEN2 = {"stablelm2", "hunyuan", "solar-open"}
"""Kinds that Transformers does not name."""


def gguf_tokenizer(folder: Path) -> Any:
    """A tokenizer of Transformers. Raises any exception of its conversion."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    architecture, parts, settings = get_gguf_tokenizer(str(source_of(folder)))
    if "tokenizer_type" not in parts:
        raise ValueError("the GGUF file has no tokenizer")
    kind = parts.get("pre_tokenizer_type")
    if parts["tokenizer_type"] == "gpt2" and kind not in {*GGUF_PRE_TOKENIZER_SPLITS, *SINGLE_DIGITS, *LIKE_GPT2,
                                                          *LIKE_QWEN2}:  # fmt: skip
        raise ValueError(f"the GGUF file's tokenizer.ggml.pre {kind!r} is not known")
    parts["pre_tokenizer_type"] = "qwen2" if kind in LIKE_QWEN2 else kind
    backend, _ = convert_gguf_tokenizer(architecture, parts)
    if kind in BEGINS and settings.get("bos_token"):
        settings.setdefault("add_bos_token", True)
    mend(backend, kind, parts)
    settings["chat_template"] = _template(folder)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def mend(backend: Any, kind: str | None, parts: dict[str, Any]) -> None:
    """What Transformers leaves out of a file's settings."""
    from tokenizers import decoders, pre_tokenizers

    if kind in WHOLE_WORDS:
        backend.model.ignore_merges = True
    if kind in SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])  # fmt: skip
    if parts["tokenizer_type"] == "llama" and parts.get("add_prefix_space") is False and backend.pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _template(folder: Path) -> str | dict[str, str] | None:
    found = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    return {one["name"]: one["template"] for one in found} if isinstance(found, list) else found
