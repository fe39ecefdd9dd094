"""Every model family, both levels, both dtypes: greedy tokens equal to Transformers', prompts batched and chunked."""

from __future__ import annotations

import pytest
from paged_driver import greedy
from zoo import FAMILIES, checkpoint, make_prompts, truth

from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target

NUM_TOKENS = 64
PROMPT_LENGTHS = (3, 9, 20)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, dtype: str) -> None:
    path = checkpoint(family, dtype)
    prompts = make_prompts(PROMPT_LENGTHS)
    expected = truth(path, prompts, NUM_TOKENS)
    assert len({tuple(tokens) for tokens in expected}) == len(prompts) and len(set(expected[0])) > 8
    for level in (0, 1):
        model = compile_model(CompileConfig(model=str(path), level=level), detect_target())
        assert greedy(model, prompts, NUM_TOKENS) == expected, f"level {level}"
    assert model._executable.num_regions == 0


def test_sequences_longer_than_the_first_chunk_agree_with_one_chunk() -> None:
    path = checkpoint("qwen3", "bfloat16")
    model = compile_model(CompileConfig(model=str(path)), detect_target())
    prompts = make_prompts((40, 17))
    assert greedy(model, prompts, 24, chunk=5) == greedy(model, prompts, 24, chunk=64)
