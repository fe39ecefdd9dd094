"""The tiny checkpoints are what the other tests take them for: decided, diverse, and the same in bfloat16."""

from __future__ import annotations

import pytest
import torch
import zoo

NUM_TOKENS = 24
MIN_MARGIN = 2.0  # logits; rounding of bfloat16 moves them by less than 0.3


@pytest.mark.slow
@pytest.mark.parametrize("family", list(zoo.FAMILIES))
def test_margins_and_diversity(family: str) -> None:
    continuations = []
    for dtype in ("float32", "bfloat16"):
        model = zoo.load(zoo.checkpoint(family, dtype))
        assert model.dtype == getattr(torch, dtype)
        found = [zoo.continue_greedily(model, prompt, NUM_TOKENS) for prompt in zoo.PROMPTS]
        assert min(min(margins) for _, margins in found) > MIN_MARGIN
        continuations.append([tokens for tokens, _ in found])
    assert continuations[0] == continuations[1]
    learned = [
        text[len(prompt) :][:NUM_TOKENS].tolist() for text, prompt in zip(zoo.texts(), zoo.PROMPTS, strict=False)
    ]
    assert continuations[0] == learned
    assert all(len(set(tokens)) > 0.7 * NUM_TOKENS for tokens in learned)


def test_attention_is_needed() -> None:
    """The same word is followed by different ones, in most places."""
    after: dict[int, set[int]] = {}
    for text in zoo.texts().tolist():
        for word, following in zip(text, text[1:], strict=False):
            after.setdefault(word, set()).add(following)
    assert sum(len(words) > 3 for words in after.values()) > 0.8 * zoo.VOCAB


def test_truth_is_transformers_generate() -> None:
    path = zoo.checkpoint("llama")
    assert zoo.truth(path, zoo.PROMPTS[:2], 5) == [zoo.texts()[i, len(zoo.PROMPTS[i]) :][:5].tolist() for i in range(2)]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in path.iterdir()}


def test_build_is_deterministic_and_cached(tmp_path) -> None:
    first, second = (
        zoo.checkpoint("llama", cache_root=tmp_path / "a"),
        zoo.checkpoint("llama", cache_root=tmp_path / "b"),
    )
    assert first.name == second.name
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    changed = (first / "model.safetensors").stat().st_mtime_ns
    assert zoo.checkpoint("llama", cache_root=tmp_path / "a") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == changed


@pytest.mark.parametrize("family", list(zoo.REFUSED))
def test_refused_families_are_saved(family: str) -> None:
    assert (zoo.checkpoint(family) / "config.json").is_file()
