"""Models whose graphs define operands late or join tensors before the tokens: greedy tokens equal to Transformers'.

StableLM norms each head and joins them along the heads; Nemotron's norms have a weight that is computed; HRM runs its
layers several times over, with rotations and caches of each time. Weights are random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from paged_driver import greedy
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo import COMMON, IDS, Family, make_prompts, publish, truth

from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target

NUM_TOKENS = 24
PROMPT_LENGTHS = (3, 9, 20, 1)
HEADS: dict[str, Any] = COMMON | dict(head_dim=16)
MODELS = {
    "stablelm": Family("StableLmConfig", COMMON | dict(qk_layernorm=True)),
    "stablelm_parallel": Family("StableLmConfig", COMMON | dict(qk_layernorm=True, use_parallel_residual=True)),
    "stablelm_bias": Family("StableLmConfig", COMMON | dict(qk_layernorm=True, use_qkv_bias=True)),
    "nemotron": Family("NemotronConfig", HEADS),
    "hrm_text": Family("HrmTextConfig", HEADS | dict(num_hidden_layers=1, num_key_value_heads=4)),
}


def random_model(family: Family) -> PreTrainedModel:
    config = getattr(transformers, family.config_class)(**family.fields, **IDS)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which start as ones and zeros
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    path = tmp_path_factory.mktemp("models") / request.param
    publish(lambda: random_model(MODELS[request.param]), torch.float32, path)
    return path, truth(path, make_prompts(PROMPT_LENGTHS), NUM_TOKENS)


@pytest.mark.parametrize("level", [0, 1, 3])
def test_greedy_tokens_equal_transformers(model: tuple[Path, list[list[int]]], level: int) -> None:
    path, expected = model
    assert len({tuple(tokens) for tokens in expected}) > 1
    compiled = compile_model(CompileConfig(model=str(path), level=level), detect_target())
    assert greedy(compiled, make_prompts(PROMPT_LENGTHS), NUM_TOKENS) == expected
