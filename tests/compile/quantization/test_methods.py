"""Quantized checkpoints of every method: their weights are those that the method's package reads from them."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import quantized
import torch
import zoo
from paged_driver import greedy

from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.checkpoint import CodedTensor
from fuseline.compile.capture.coded import open_stored
from fuseline.compile.capture.reader import Reader
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target

PROMPTS = zoo.make_prompts([3, 11])
cases = functools.cache(quantized.cases)
CASES = (
    "gptq gptq-zeros gptq-v2 gptq-act-order gptq-8bit awq fp8 fp8-blocks w4a16 w4a16-zeros w8a16 w8a8 ct-fp8 nf4 "
    "nf4-nested fp4 bnb-int8"
).split()


def test_every_case_is_tested() -> None:
    assert set(CASES) == set(cases())


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_package_and_tokens_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    path, plain = quantized.checkpoint(case, tmp_path)
    config = CompileConfig(str(path), cache_dir=str(tmp_path), skip_model_check=True)
    stored = open_stored(config)
    with Reader() as reader:
        for weight, values in plain.items():
            one = stored[weight]
            assert isinstance(one, CodedTensor) and str(one.published.layout) == case.layout
            torch.testing.assert_close(reader.value(lazy_tensor.whole(one)), values, rtol=2e-6, atol=1e-7)
    model = quantized.reference(plain)
    want = [zoo.continue_greedily(model, prompt, 12)[0] for prompt in PROMPTS]
    assert greedy(compile_model(config, detect_target()), PROMPTS, 12) == want
