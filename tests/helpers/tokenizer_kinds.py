"""Checkpoint directories with tokenizers of many kinds, small and made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "the a Paris Paris is the capital of France, and the sky is blue. Don't you know?",
    "é ö ü à 中文 字 こんにちは emoji 🙂🙂 text",
    "def f(x):\n    return {\n\t'a': 1}\n\n\n1234 3.14",
    "we 've they 're I 'm he 's do n't stop ! ? , .",
]
TEXTS = [
    "the a Paris Paris", " Paris", "Paris  is\n\n the", "", "é中🙂x🙂", "\ufffd \u0301",
    "a<s>b </s> <think>c</think> <|im_end|>", "1234\t{", "unseen: Ωж𐍈", "we 've , do n't . he ' s",
]  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
Write = Callable[[Path], None]


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def save(folder: Path, tokenizer: Tokenizer, config: dict[str, Any], model_type: str = "llama") -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "config.json", {"model_type": model_type})


def byte_level_bpe(special: list[str] | None = None) -> Tokenizer:
    """As GPT-2, Llama-3 and Qwen have it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special or ["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def sentencepiece_bpe(strips: bool = True) -> Tokenizer:
    """As Llama-2 and Mistral have it; without the strip as Gemma."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    names = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    characters = sorted(set("▁" + "".join(CORPUS[:1])) - {" "})
    trainer = trainers.BpeTrainer(
        vocab_size=len(names) + 90,
        special_tokens=names,
        initial_alphabet=characters,
        limit_alphabet=40,
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    made = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made


def unigram() -> Tokenizer:
    """As T5 has it."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=110, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return made


def wordpiece() -> Tokenizer:
    """As BERT has it."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=170, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def suffixed_bpe() -> Tokenizer:
    """As the first GPT has it: the end of a word is part of its last token."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


BACKENDS = {
    "byte-level": byte_level_bpe, "sentencepiece": sentencepiece_bpe, "no strip": lambda: sentencepiece_bpe(False),
    "unigram": unigram, "wordpiece": wordpiece, "suffix": suffixed_bpe,
}  # fmt: skip
BERT = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
OPT = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "add_bos_token": True}
CLEANED = {"clean_up_tokenization_spaces": True}
CHATML = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}


def added(content: str, special: bool, **more: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **more}
    return {"content": content, "special": special, **flags}


def _bounded(folder: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=12, pad_token="<|endoftext|>", pad_id=0)
    save(folder, tokenizer, {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}, "gpt2")


def _maps(folder: Path) -> None:
    save(folder, byte_level_bpe(["<|endoftext|>", "<|im_end|>"]), {"tokenizer_class": "PreTrainedTokenizerFast"})
    write_json(
        folder / "special_tokens_map.json", {"eos_token": added("<|im_end|>", True), "bos_token": "<|endoftext|>"}
    )
    write_json(folder / "added_tokens.json", {"<think>": 340, "</think>": 341})


def _decoder_table(folder: Path) -> None:
    tokenizer = byte_level_bpe(["<|endoftext|>", "<|im_end|>"])
    size = tokenizer.get_vocab_size()
    table = {str(size): added("<think>", False), str(size + 1): added("</think>", False, lstrip=True)}
    table[str(size + 2)] = added("<|tool|>", True, rstrip=True)
    save(
        folder, tokenizer, {**CHATML, "added_tokens_decoder": table, "additional_special_tokens": ["<|more|>"]}, "qwen2"
    )


def _gpt2_files(folder: Path) -> None:
    """vocab.json and merges.txt alone; what begins and ends a text is the default of the class."""
    byte_level_bpe().model.save(str(folder))
    write_json(folder / "config.json", {"model_type": "gpt2"})


def _gpt2_files_and_bos(folder: Path) -> None:
    _gpt2_files(folder)
    write_json(folder / "tokenizer_config.json", {"add_bos_token": True, "bos_token": "<|endoftext|>"})
    write_json(folder / "added_tokens.json", {"<think>": 340})


def _llama(**config: Any) -> Write:
    return lambda folder: save(folder, sentencepiece_bpe(), {**LLAMA, **config})


def _plain(backend: Callable[[], Tokenizer], config: dict[str, Any], model_type: str) -> Write:
    return lambda folder: save(folder, backend(), config, model_type)


CHECKPOINTS: dict[str, Write] = {
    "truncation and padding": _bounded,
    "special tokens map": _maps,
    "added tokens decoder": _decoder_table,
    "vocab and merges": _gpt2_files,
    "vocab, merges and bos": _gpt2_files_and_bos,
    "gpt2 class": _plain(byte_level_bpe, {"tokenizer_class": "GPT2Tokenizer"}, "gpt2"),
    "gpt2 prefix": _plain(byte_level_bpe, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, "gpt2"),
    "opt": _plain(lambda: byte_level_bpe(["<s>", "<pad>", "</s>", "<unk>"]), OPT, "opt"),
    "llama": _llama(),
    "llama legacy": _llama(legacy=True),
    "llama without bos": _llama(add_bos_token=False),
    "llama with eos": _llama(add_eos_token=True),
    "llama without prefix": _llama(add_prefix_space=False),
    "as the file says": _plain(sentencepiece_bpe, {**LLAMA, "tokenizer_class": "PreTrainedTokenizerFast"}, "mistral"),
    "file and bos": _plain(byte_level_bpe, {"bos_token": "<|endoftext|>", "add_bos_token": True}, "qwen2"),
    "gemma": _plain(lambda: sentencepiece_bpe(False), {**LLAMA, "tokenizer_class": "PreTrainedTokenizerFast"}, "gemma"),
    "t5": _plain(unigram, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}, "t5"),
    "bert": _plain(wordpiece, {**BERT, "tokenizer_class": "BertTokenizer"}, "bert"),
    "bert, cleaned": _plain(wordpiece, {**BERT, "tokenizer_class": "BertTokenizer", **CLEANED}, "bert"),
    "cleaned in vain": _plain(byte_level_bpe, {"eos_token": "<|endoftext|>", **CLEANED}, "gpt2"),
    "split special": _plain(byte_level_bpe, {"eos_token": "<|endoftext|>", "split_special_tokens": True}, "qwen2"),
    "unknown model": _plain(byte_level_bpe, {"eos_token": "<|endoftext|>"}, "a-model-of-tomorrow"),
}  # fmt: skip
"""What is stored -> how to write it into an empty directory."""
