"""Quantized weights on a GPU that is none: tokens are those of Transformers on the dequantized weights."""

from __future__ import annotations

from pathlib import Path

import cuda_emulator
import pytest
import quantized
import torch
import zoo
from cuda_target_cases import count_kernels
from fake_gpu import GPU, FakeGraphs, capture_when_allocated
from paged_driver import greedy

from fuseline.compile.backends.cuda.model import CudaModel
from fuseline.compile.compiler import compile_model, optimize
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.formats.encode import encode
from fuseline.compile.kernels.cuda import library as cuda_library
from fuseline.compile.ops.coded import dequantize, parse_layout
from fuseline.compile.quantization.methods import online_layouts
from fuseline.compile.specs import QuantizedSpec

PROMPTS = zoo.make_prompts([3, 11])
BY_TRITON = "triton.linear_code_rows | triton.decode, torch.linear"


def build(folder: Path, graphs: GraphConfig | None = None, **settings: object) -> CudaModel:
    config = CompileConfig(str(folder), cache_dir=str(folder / "cache"), skip_model_check=True, **settings)
    return compile_model(config, GPU, graphs=graphs)


def truth(folder: Path, num_tokens: int) -> list[list[int]]:
    reference = zoo.load(folder)
    return [zoo.continue_greedily(reference, prompt, num_tokens)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("name", ("gptq-act-order", "awq", "nf4", "fp8-blocks"))
def test_tokens_of_a_checkpoint_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Linears read codes; nothing is dequantized as it is loaded."""
    case = quantized.cases()[name]
    path, _ = quantized.checkpoint(case, tmp_path)
    model = build(path)
    assert model.info.quantized == (f"21 as {case.layout}",)
    assert model.report.stage_ops["lower"]["linear_code_rows"] == (21 if "order" in name else 12)
    assert greedy(model, PROMPTS, 3) == truth(tmp_path / "plain", 3)


def test_what_no_kernel_takes_is_dequantized(tmp_path: Path) -> None:
    """Experts, and so says the table at start."""
    quantized.checkpoint(quantized.cases()["mxfp4"], tmp_path, "gpt_oss", ends=(".gate_up_proj", ".down_proj"))
    _, result = optimize(CompileConfig(str(tmp_path / "model"), skip_model_check=True), GPU)
    (kept,) = [spec.weights for spec in result.specs if isinstance(spec, QuantizedSpec)]
    assert kept == ("6 dequantized as they are loaded",)


@pytest.mark.parametrize("name", ("int4", "fp8"))
def test_plain_weights_quantized_as_they_are_loaded(name: str, tmp_path: Path) -> None:
    """With a head that is the embedding, in graphs that are replayed."""
    reference = zoo.load(zoo.checkpoint("gemma2"))
    layouts = [parse_layout(one) for one in online_layouts(CompileConfig("", quantization=name), "float32")]
    with torch.no_grad():
        for module in reference.modules():
            if isinstance(module, torch.nn.Linear):
                layout = layouts[module is reference.lm_head]
                module.weight.copy_(dequantize(encode(module.weight, layout), layout))
    config = CompileConfig(str(zoo.checkpoint("gemma2")), cache_dir=str(tmp_path), skip_model_check=True,
                           quantization=name)  # fmt: skip
    model, api = compile_model(config, GPU, graphs=GraphConfig((2,), mixed_sizes=())), FakeGraphs()
    capture_when_allocated(model, api, [])
    ops = model.report.stage_ops["lower"]
    assert ops["linear_code_rows"] == 13 and ops["embedding_code_rows"] == 1
    want = [zoo.continue_greedily(reference, prompt, 4)[0] for prompt in PROMPTS]
    assert greedy(model, PROMPTS, 4) == want
    assert set(api.replays) == {2}


def test_kernels_of_a_step(tmp_path: Path, monkeypatch) -> None:
    """Few rows are C++'s where there is its library; with batch invariance one kernel takes any number."""
    plain = str(zoo.checkpoint("llama", "bfloat16"))

    def found(**settings: object) -> dict[str, int]:
        config = CompileConfig(plain, cache_dir=str(tmp_path), skip_model_check=True, quantization="int4", **settings)
        captured, _ = optimize(config, GPU)
        return {label: count for label, count in count_kernels(captured.graph).items() if "code_rows" in label}

    assert found() == {BY_TRITON: 13}
    assert found(batch_invariant=True) == {"triton.linear_code_rows_invariant": 13}
    monkeypatch.setattr(cuda_library, "library_for", lambda target: cuda_emulator.emulator())
    assert found() == {f"cuda.linear_code_rows | {BY_TRITON}": 13}
