"""Quantized checkpoints of every method: their weights are those that the method's package reads from them."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import quantized
import torch
import zoo
from paged_driver import greedy
from safetensors.torch import load_file, save_file

from fuseline.compile import compiler
from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.checkpoint import CodedTensor
from fuseline.compile.capture.coded import open_stored
from fuseline.compile.capture.errors import CaptureError, LoadError
from fuseline.compile.capture.reader import Reader
from fuseline.compile.compiler import compile_model, optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.formats.encode import encode
from fuseline.compile.ops.coded import dequantize, parse_layout
from fuseline.compile.quantization.methods import method_of, online_layouts
from fuseline.compile.target import CPU, Target, detect_target

PROMPTS = zoo.make_prompts([3, 11])
UP = "model.layers.1.mlp.up_proj"
cases = functools.cache(quantized.cases)
LINEARS = (
    "gptq gptq-zeros gptq-v2 gptq-act-order gptq-8bit awq fp8 fp8-blocks w4a16 w4a16-zeros w8a16 w8a8 ct-fp8 nf4 "
    "nf4-nested fp4 bnb-int8"
).split()
MODULES = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
EXPERTS = [
    ("mixtral", "gptq", MODULES, "float32"), ("mixtral", "awq", MODULES, "float32"),
    ("mixtral", "w4a16", MODULES, "bfloat16"), ("qwen3_moe", "ct-fp8", MODULES, "bfloat16"),
    ("deepseek_v3", "fp8-blocks", MODULES, "float32"),
    ("gpt_oss", "mxfp4", (".gate_up_proj", ".down_proj"), "bfloat16"),
]  # fmt: skip
"""(family, case, endings of the quantized weights, the model's dtype)."""


def test_every_case_is_tested() -> None:
    assert {*LINEARS, *(name for _, name, *_ in EXPERTS)} == set(cases())


def assert_tokens_are_those_of_transformers(folder: Path, **settings: object) -> CpuModel:
    config = CompileConfig(str(folder / "model"), cache_dir=str(folder), skip_model_check=True, **settings)
    reference = zoo.load(folder / "plain")
    want = [zoo.continue_greedily(reference, prompt, 12)[0] for prompt in PROMPTS]
    model = compile_model(config, detect_target())
    assert greedy(model, PROMPTS, 12) == want
    return model


@pytest.mark.parametrize("name", LINEARS)
def test_weights_are_those_of_the_package_and_tokens_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    path, plain = quantized.checkpoint(case, tmp_path)
    stored = open_stored(CompileConfig(str(path)))
    with Reader() as reader:
        for weight, values in plain.items():
            one = stored[weight]
            assert isinstance(one, CodedTensor) and str(one.published.layout) == case.layout
            torch.testing.assert_close(reader.value(lazy_tensor.whole(one)), values, rtol=2e-6, atol=1e-7)
    model = assert_tokens_are_those_of_transformers(tmp_path)
    expected = 21 if "order" in name else 12
    assert calls(model, "linear_codes") == expected, "all but the logits'; joined where they can be"
    assert model.info.quantized == (f"21 as {case.layout}",)


@pytest.mark.parametrize(("family", "name", "ends", "dtype"), EXPERTS)
def test_experts_stay_codes(family: str, name: str, ends: tuple, dtype: str, tmp_path: Path) -> None:
    """One tensor an expert or one for all, gates and ups joined or in turn, with biases or without."""
    case = cases()[name]
    quantized.checkpoint(case, tmp_path, family, dtype, ends)
    model = assert_tokens_are_those_of_transformers(tmp_path)
    num_layers = 2 if family == "deepseek_v3" else 3
    assert calls(model, "experts_codes") == num_layers and "experts_panels" not in model.report.stage_ops["lower"]
    assert len(model.info.quantized) == 1 and model.info.quantized[0].endswith(f" as {case.layout}")
    plain = sum(weight.nbytes for name, weight in load_file(tmp_path / "plain" / "model.safetensors").items())
    assert model.info.weight_bytes < plain


@pytest.mark.parametrize("name", ["gptq-act-order"])
def test_experts_that_no_kernel_takes_are_dequantized(name: str, tmp_path: Path) -> None:
    """An order of inputs for each expert."""
    quantized.checkpoint(cases()[name], tmp_path, "mixtral", ends=MODULES[1:])
    model = assert_tokens_are_those_of_transformers(tmp_path)
    assert calls(model, "experts_panels") == 3 and model.info.quantized == ("6 dequantized as they are loaded",)


def test_a_model_of_half_precision(tmp_path: Path) -> None:
    """Codes are multiplied as they are, so that logits are at least as near as those of rounded weights."""
    quantized.checkpoint(cases()["awq"], tmp_path, "qwen3", "bfloat16")
    assert_tokens_are_those_of_transformers(tmp_path)


def test_reference_ops_have_dequantized_weights(tmp_path: Path) -> None:
    quantized.checkpoint(cases()["awq"], tmp_path)
    model = assert_tokens_are_those_of_transformers(tmp_path, level=0)
    assert model.info.quantized == ()


def test_a_warm_start_keeps_the_layouts(tmp_path: Path, monkeypatch) -> None:
    """Nothing is captured or resolved again; other tensors in the same files make another graph."""
    path, _ = quantized.checkpoint(cases()["gptq"], tmp_path)
    first = assert_tokens_are_those_of_transformers(tmp_path)
    monkeypatch.setattr(compiler, "layouts_of", None)
    again = assert_tokens_are_those_of_transformers(tmp_path)
    assert again.info == first.info
    for name in ("model", "plain"):
        state = load_file(tmp_path / name / "model.safetensors")
        plain = load_file(tmp_path / "plain" / "model.safetensors")[f"{UP}.weight"]
        state = {key: value for key, value in state.items() if not key.startswith(UP)} | {f"{UP}.weight": plain}
        save_file(state, tmp_path / name / "model.safetensors", {"format": "pt"})
    monkeypatch.undo()
    assert assert_tokens_are_those_of_transformers(tmp_path).info.quantized == ("20 as int4/32/float16",)


@pytest.mark.parametrize(("target", "settings"), [
    (CPU, {"level": 0}), (CPU, {"disabled_passes": ("pack_weights",)}), (Target("cuda", "sm_90", 1), {"level": 0}),
], ids=str)  # fmt: skip
def test_plain_weights_stay_plain_where_nothing_reads_codes(target: Target, settings: dict) -> None:
    config = CompileConfig(str(zoo.checkpoint("llama")), skip_model_check=True, quantization="int8", **settings)
    with pytest.raises(CaptureError, match="--quantization int8 quantizes plain weights from -O1 on only"):
        optimize(config, target)


def test_a_tied_embedding_of_codes_is_one_copy(tmp_path: Path) -> None:
    quantized.checkpoint(cases()["w8a16"], tmp_path, "gemma2", ends=("_proj.weight", "embed_tokens.weight"))
    model = assert_tokens_are_those_of_transformers(tmp_path)
    assert calls(model, "embedding_codes") == 1 and calls(model, "linear_codes") == 13


def calls(model: CpuModel, op: str) -> int:
    """Calls of a native kernel in the compiled graph."""
    return model.report.stage_ops["lower"][op]


# Refusals.


@pytest.mark.parametrize(("asked", "config", "message"), [
    ("awq", None, "--quantization awq: config.json has no quantization_config, so its weights are plain; fp8, int4"),
    ("awq", "gptq", "--quantization awq: the checkpoint's weights are quantized by gptq; leave the flag out"),
    ("int8", "gptq", "--quantization int8: the checkpoint's weights are quantized by gptq; leave the flag out"),
    (None, {"quant_method": "none_such"}, "its weights are quantized by none_such, which is not supported; supported"),
    (None, {"quant_method": "gptq", "bits": 5}, "gptq: bits 5 is not supported: it must be 4 or 8"),
    (None, {"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq: version 'gemv' is not supported"),
    (None, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"a": {}}},
     "compressed-tensors: format 'nvfp4-pack-quantized' is not supported: it must be pack-quantized or"),
    (None, [1], "quantization_config is no object"),
], ids=str)  # fmt: skip
def test_what_is_not_supported_is_refused_in_one_line(asked, config, message: str, tmp_path: Path) -> None:
    config = cases()[config].config if isinstance(config, str) else config
    values = {"model_type": "llama"} | ({"quantization_config": config} if config else {})
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CaptureError, match=re.escape(message)) as caught:
        optimize(CompileConfig(str(tmp_path), quantization=asked))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", ("gptq_marlin", "moe_wna16", "ipex", "gptq"))
def test_a_name_of_a_kernel_stands_for_the_method(asked: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": cases()["gptq"].config}))
    assert method_of(CompileConfig(str(tmp_path), quantization=asked)).name == "gptq"


@pytest.mark.parametrize(("name", "change", "message"), [
    ("gptq", lambda s: s.pop(f"{UP}.scales"), f"{UP}: its tensors .g_idx, .qweight, .qzeros are not those of gptq"),
    ("gptq", lambda s: s[f"{UP}.scales"].fill_(torch.nan), f"{UP}.weight in .*safetensors has a scale that is not f"),
    ("gptq", lambda s: s[f"{UP}.qzeros"].add_(1), "qzeros are not 8, as they are where config.json has sym true"),
    ("gptq", lambda s: s.update({f"{UP}.scales": s[f"{UP}.scales"][:1].clone()}), "its tensors do not fit together"),
    ("w4a16", lambda s: s[f"{UP}.weight_shape"].fill_(7), f"{UP}.weight in .* has shape .7, 7., but config.json"),
    ("ct-fp8", lambda s: s.pop(f"{UP}.weight_scale"), f"{UP}.weight is fp8 without a weight_scale"),
    ("w8a8", lambda s: s.pop(f"{UP}.weight_scale"), f"{UP}.weight is int8 without a weight_scale"),
])  # fmt: skip
def test_damaged_tensors_are_refused_by_name(name: str, change, message: str, tmp_path: Path) -> None:
    path, _ = quantized.checkpoint(cases()[name], tmp_path)
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=message) as caught:
        compile_model(CompileConfig(str(path), cache_dir=str(tmp_path), skip_model_check=True), detect_target())
    assert "\n" not in str(caught.value)


# Plain weights, quantized as they are loaded.


@pytest.mark.parametrize(("name", "share"), [("int8", 0.36), ("fp8", 0.36), ("int4", 0.26)])
def test_plain_weights_are_quantized_as_they_are_loaded(name: str, share: float, tmp_path: Path) -> None:
    """The logits' weight too, and with it a tied embedding. `share`: of the plain weights' bytes."""
    plain = zoo.checkpoint("gemma2")
    reference = zoo.load(plain)
    size = sum(weight.nbytes for weight in {id(weight): weight for weight in reference.parameters()}.values())
    layout, of_head = (parse_layout(one) for one in online_layouts(CompileConfig("", quantization=name), "float32"))
    with torch.no_grad():
        for module in reference.modules():
            if isinstance(module, torch.nn.Linear):
                form = of_head if module is reference.lm_head else layout
                module.weight.copy_(dequantize(encode(module.weight, form), form))
    config = CompileConfig(str(plain), cache_dir=str(tmp_path), skip_model_check=True, quantization=name)
    model = compile_model(config, detect_target())
    assert calls(model, "linear_codes") == 13 and calls(model, "embedding_codes") == 1
    assert model.info.weight_bytes < size * share
    want = [zoo.continue_greedily(reference, prompt, 12)[0] for prompt in PROMPTS]
    assert greedy(model, PROMPTS, 12) == want


@pytest.mark.parametrize(("family", "name"), [("mixtral", "int8"), ("gpt_oss", "int4"), ("qwen3_moe", "fp8")])
def test_plain_experts_are_quantized_as_they_are_loaded(family: str, name: str, tmp_path: Path) -> None:
    """Also those that the checkpoint has transposed."""
    plain = zoo.checkpoint(family)
    reference = zoo.load(plain)
    layout, of_head = (parse_layout(one) for one in online_layouts(CompileConfig("", quantization=name), "float32"))
    with torch.no_grad():
        for module, weight in reference.named_parameters():
            if weight.ndim == 2 and "embed" not in module:
                form = of_head if module.startswith("lm_head") else layout
                weight.copy_(dequantize(encode(weight, form), form))
            for matrix in weight if weight.ndim == 3 else ():
                rows = matrix.mT if family == "gpt_oss" else matrix
                rows.copy_(dequantize(encode(rows, layout), layout))
    config = CompileConfig(str(plain), cache_dir=str(tmp_path), skip_model_check=True, quantization=name)
    model = compile_model(config, detect_target())
    assert calls(model, "experts_codes") == 3
    want = [zoo.continue_greedily(reference, prompt, 12)[0] for prompt in PROMPTS]
    assert greedy(model, PROMPTS, 12) == want


@pytest.mark.parametrize(("name", "error"), [
    ("int8/128/float32", 0.0066), ("int8/row/float16", 0.008), ("int4/32/bfloat16", 0.085), ("fp8/row/float32", 0.027),
])  # fmt: skip
def test_codes_are_near_the_weights_that_they_are_made_of(name: str, error: float) -> None:
    """Of a normal distribution; the scales that int4 takes are better than those of the largest values."""
    layout, weight = parse_layout(name), torch.randn(64, 520, generator=torch.Generator().manual_seed(0))
    found = dequantize(encode(weight, layout), layout)
    assert (found - weight).norm() / weight.norm() < error
    assert dequantize(encode(torch.zeros(3, 40), layout), layout).abs().max() == 0
    if layout.kind == "int4":
        parts = weight[:, :512].unflatten(1, (-1, 32))
        scales = parts.abs().amax(-1, keepdim=True) / 7
        plain = ((parts / scales).round() * scales).flatten(1)
        assert (found - weight)[:, :512].norm() < 0.95 * (plain - weight[:, :512]).norm()
