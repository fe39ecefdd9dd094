"""Compiled models that are fed embeddings: those of a prompt's tokens give the answer to the prompt."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from engine_walk_cases import Walk
from real_engine import cpu_engine, gpu_engine
from zoo import checkpoint, load, make_prompts, truth

from fuseline.compile.config import GraphConfig
from fuseline.engine.engine import Engine
from fuseline.engine.messages import PromptEmbeds

NUM_TOKENS = 5
PROMPTS = make_prompts((3, 20, 33))
GREEDY = {"temperature": 0.0, "max_tokens": NUM_TOKENS}


@functools.cache
def embedder(family: str, dtype: str = "float32") -> torch.nn.Module:
    """Transformers' module from tokens to inputs_embeds."""
    return load(checkpoint(family, dtype)).get_input_embeddings()


def span(module: torch.nn.Module, prompt: list[int], begin: int, end: int) -> PromptEmbeds:
    """The embeddings of tokens [begin, end) of the prompt."""
    with torch.no_grad():
        rows = module(torch.tensor(prompt[begin:end])).float().numpy()
    return PromptEmbeds(begin, end - begin, rows.tobytes())


def hidden_prompt(prompt: list[int], *spans: PromptEmbeds) -> list[int]:
    """Token 0 where embeddings are given."""
    given = {at for part in spans for at in range(part.start, part.start + part.count)}
    return [0 if at in given else token for at, token in enumerate(prompt)]


def answers(engine: Engine, module: torch.nn.Module, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """Of each prompt fed by embeddings throughout, in its middle, and not at all; all in the same steps."""
    walk = Walk(engine)
    for prompt in prompts:
        size = len(prompt)
        for spans in ([(0, size)], [(1, 2), (size // 2, size - 1)], []):
            embeds = [span(module, prompt, *one) for one in spans if one[0] < one[1]]
            walk.submit(hidden_prompt(prompt, *embeds), embeds=embeds, **GREEDY)
            walk.step()
    walk.finish()
    assert all(output.error == "" for outputs in walk.outputs.values() for output in outputs)
    return [walk.tokens(name) for name in walk.requests]


def thrice(prompts: list[list[int]], family: str, dtype: str = "float32") -> list[list[int]]:
    return [tokens for tokens in truth(checkpoint(family, dtype), prompts, NUM_TOKENS) for _ in range(3)]


@pytest.mark.parametrize(("family", "dtype", "level"), [
    ("llama", "float32", 0), ("llama", "bfloat16", 1), ("llama", "float32", 3), ("gemma2", "float32", 1),
    ("gpt2", "bfloat16", 3), ("opt", "float32", 1),
])  # fmt: skip
def test_embeddings_of_the_tokens_give_their_answers(family: str, dtype: str, level: int) -> None:
    """gemma2 scales embeddings, gpt2 and opt add those of positions."""
    engine = cpu_engine(family, dtype, level=level, takes_embeds=True)
    assert answers(engine, embedder(family, dtype)) == thrice(PROMPTS, family, dtype)


def test_a_model_on_a_gpu_takes_embeddings() -> None:
    """Steps without any are replayed."""
    engine, prompts = gpu_engine("llama", GraphConfig((2,), mixed_sizes=(16,)), takes_embeds=True), PROMPTS[:1]
    with engine.runner.device.guard():
        assert answers(engine, embedder("llama"), prompts) == thrice(prompts, "llama")
    assert engine.runner.device.graphs.replays and engine.runner.device.graphs.segment_replays


def test_cached_blocks_are_those_of_the_embeddings() -> None:
    """All prompts are token 0 for the engine."""
    walk, module = Walk(cpu_engine("llama", takes_embeds=True)), embedder("llama")
    texts, found, cached = make_prompts((40, 40)), [], []
    for text in (*texts, *texts):
        name = walk.submit([0] * len(text), embeds=[span(module, text, 0, len(text))], **GREEDY)
        walk.finish()
        found.append(walk.tokens(name))
        cached.append(walk.outputs[name, 0][0].num_cached_tokens)
    assert cached == [0, 0, 32, 32]
    assert found == 2 * truth(checkpoint("llama"), texts, NUM_TOKENS)


def test_embeddings_of_another_size_fail_their_request() -> None:
    walk = Walk(cpu_engine("llama", takes_embeds=True))
    name = walk.submit([1, 2], embeds=[PromptEmbeds(0, 1, np.zeros(8, np.float32).tobytes())], **GREEDY)
    walk.finish()
    assert walk.outputs[name, 0][0].error.startswith("embeddings at 0 must be float32 [1, 64]")


def test_a_model_that_was_not_asked_takes_none() -> None:
    walk = Walk(cpu_engine("llama"))
    name = walk.submit([1, 2], embeds=[span(embedder("llama"), [1], 0, 1)], **GREEDY)
    walk.finish()
    assert walk.outputs[name, 0][0].error == "this model takes no embeddings"
