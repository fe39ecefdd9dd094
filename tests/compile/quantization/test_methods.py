"""Quantized checkpoints of every method: their weights are those that the method's package reads from them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import quantized
import quantized_packers
import torch
import zoo
from paged_driver import greedy
from safetensors.torch import load_file, save_file

from fuseline.compile import compiler
from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.checkpoint import CodedTensor
from fuseline.compile.capture.coded import layout_of, open_stored
from fuseline.compile.capture.errors import CaptureError, LoadError
from fuseline.compile.capture.reader import Reader
from fuseline.compile.compiler import compile_model, optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.formats.encode import encode
from fuseline.compile.ops.coded import dequantize, parse_layout
from fuseline.compile.ops.linear_codes_int8 import quantize_rows
from fuseline.compile.quantization.methods import in_words, is_router, method_of, online_layouts
from fuseline.compile.quantization.published import QuantizationError
from fuseline.compile.specs import QuantizedSpec
from fuseline.compile.target import CPU, Target, detect_target

PROMPTS = zoo.make_prompts([3, 11])
UP = "model.layers.1.mlp.up_proj"
cases = functools.cache(lambda: quantized.cases() | quantized_packers.cases())
LINEARS = (
    "gptq gptq-zeros gptq-v2 gptq-act-order gptq-8bit gptq-2bit gptq-3bit auto-round auto-round-v2 awq marlin "
    "marlin-24 marlin-24-8bit ct-marlin-24 qqq qqq-groups hqq hqq-axis0 hqq-8bit hqq-3bit hqq-2bit hqq-1bit aqlm-2x8 "
    "aqlm-1x16 fp8 fp8-blocks w4a16 w4a16-zeros w8a16 w8a8 w8a8-uneven w3a16 w5a16-zeros ct-fp8 ct-nvfp4 ct-mxfp4 "
    "ct-mxfp6 ct-mxfp8 quark-int4 quark-uint4 quark-int8 quark-int8-groups quark-uint8-tensor quark-int4-channel "
    "quark-fp8 quark-fp4 modelopt-fp8 modelopt-fp8-blocks nvfp4 nf4 nf4-nested fp4 bnb-int8 deepspeedfp-6 "
    "deepspeedfp-8 deepspeedfp-12"
).split()
INT8_INPUTS = "w8a8-token w8a8-static w4a8".split()
MODULES = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
EXPERTS = [
    ("mixtral", "gptq", MODULES, "float32"), ("mixtral", "awq", MODULES, "float32"),
    ("mixtral", "gptq-act-order", MODULES, "float32"), ("mixtral", "w4a16", MODULES, "bfloat16"),
    ("qwen3_moe", "ct-fp8", MODULES, "bfloat16"), ("deepseek_v3", "fp8-blocks", MODULES, "float32"),
    ("gpt_oss", "mxfp4", (".gate_up_proj", ".down_proj"), "bfloat16"),
]  # fmt: skip
"""(family, case, endings of the quantized weights, the model's dtype)."""


def test_every_case_is_tested() -> None:
    assert {*LINEARS, *INT8_INPUTS, *(name for _, name, *_ in EXPERTS)} == set(cases())


def assert_tokens_are_those_of_transformers(
    folder: Path, prepare: Callable[[torch.nn.Module], None] | None = None, **settings: object
) -> CpuModel:  # fmt: skip
    config = CompileConfig(str(folder / "model"), cache_dir=str(folder), skip_model_check=True, **settings)
    reference = zoo.load(folder / "plain")
    if prepare:
        prepare(reference)
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
    if not case.writes_tokens:
        return
    model = assert_tokens_are_those_of_transformers(tmp_path)
    if case.layout == quantized.VALUES:
        assert calls(model, "linear_codes") == 0
        assert model.info.quantized == ("21 dequantized as they are loaded",)
        return
    expected = 21 if "order" in name else 3 * len(case.ends) if len(case.ends) > 1 else 12
    assert calls(model, "linear_codes") == expected, "all but the logits'; joined where they can be"
    assert model.info.quantized == (f"{len(plain)} as {case.layout}",)


@pytest.mark.parametrize("name", INT8_INPUTS)
def test_inputs_are_quantized_as_published(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    quantized.checkpoint(case, tmp_path)
    model = assert_tokens_are_those_of_transformers(tmp_path, lambda plain: quantized.quantize_inputs(plain, case))
    assert calls(model, "linear_codes_int8") == (21 if "static" in name else 12)
    assert model.info.quantized == (f"21 as {case.layout}",)


def test_inputs_stay_plain_on_a_gpu(tmp_path: Path) -> None:
    """Static ones do not keep weights from being joined there."""
    path, _ = quantized.checkpoint(cases()["w8a8-static"], tmp_path)
    _, result = optimize(CompileConfig(str(path), skip_model_check=True), Target("cuda", "sm_90", 1))
    (kept,) = (spec.weights for spec in result.specs if isinstance(spec, QuantizedSpec))
    assert len(kept) == 1 and kept[0].startswith("21 as ") and kept[0].endswith("int8/row/float32")


@pytest.mark.parametrize("largest", (0.0, 1.0, 127.5, 3e38))
def test_rows_are_quantized_as_the_package_does(largest: float) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

    args = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    x = torch.cat((torch.arange(-255, 256) / 255, torch.randn(513).clamp(-1, 1))).repeat(2, 1)[None] * largest
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    codes, scales = quantize_rows(x)
    assert torch.equal(codes, quantize(x, scale, zero, args))
    assert torch.equal(scales, scale) or largest == 0


@pytest.mark.parametrize(("family", "name", "ends", "dtype"), EXPERTS)
def test_experts_stay_codes(family: str, name: str, ends: tuple, dtype: str, tmp_path: Path) -> None:
    """One tensor an expert or one for all, gates and ups joined or in turn, with biases or without."""
    case = cases()[name]
    quantized.checkpoint(case, tmp_path, family, dtype, ends)
    model = assert_tokens_are_those_of_transformers(tmp_path)
    num_layers = 2 if family == "deepseek_v3" else 3
    assert calls(model, "experts_codes") == num_layers and "experts_panels" not in model.report.stage_ops["lower"]
    coded, *others = model.info.quantized
    assert coded.endswith(f" as {case.layout}")
    # What latents are expanded by becomes products of heads.
    assert others == (["3 dequantized as they are loaded"] if family == "deepseek_v3" else [])
    plain = sum(weight.nbytes for name, weight in load_file(tmp_path / "plain" / "model.safetensors").items())
    assert model.info.weight_bytes < plain


def test_gates_and_ups_of_different_orders_are_dequantized(tmp_path: Path) -> None:
    config = cases()["gptq-act-order"].config
    case = quantized.Case(config, quantized.gptq(act_order=True, is_shared=False), "")
    quantized.checkpoint(case, tmp_path, "mixtral", ends=MODULES[1:])
    model = assert_tokens_are_those_of_transformers(tmp_path)
    assert calls(model, "experts_panels") == 3
    assert sorted(model.info.quantized) == ["6 dequantized as they are loaded"]


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


def joined_layout(path: Path) -> str:
    """The layout of a query's and a value's weights, one after the other."""
    stored = open_stored(CompileConfig(str(path)))
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qv"]
    return str(layout_of(lazy_tensor.concatenate([lazy_tensor.whole(stored[name]) for name in names], 0)))


@pytest.mark.parametrize(("is_shared", "layout"), [(True, "int4/32/float16/order"), (False, "None")])
def test_rows_of_one_matrix_need_one_order_of_inputs(is_shared: bool, layout: str, tmp_path: Path) -> None:
    """Where Transformers joins weights as it loads them. Others than of one order are dequantized."""
    config = cases()["gptq-act-order"].config
    path, _ = quantized.checkpoint(quantized.Case(config, quantized.gptq(act_order=True, is_shared=is_shared), ""),
                                   tmp_path)  # fmt: skip
    assert joined_layout(path) == layout


def test_a_tied_embedding_of_codes_is_one_copy(tmp_path: Path) -> None:
    quantized.checkpoint(cases()["w8a16"], tmp_path, "gemma2", ends=("_proj.weight", "embed_tokens.weight"))
    model = assert_tokens_are_those_of_transformers(tmp_path)
    assert calls(model, "embedding_codes") == 1 and calls(model, "linear_codes") == 13


def test_heads_and_embeddings_may_be_quantized(tmp_path: Path) -> None:
    """An embedding of its own stays codes, too."""
    ends = ("_proj.weight", "lm_head.weight", "embed_tokens.weight")
    quantized.checkpoint(cases()["gptq-8bit"], tmp_path, ends=ends)
    model = assert_tokens_are_those_of_transformers(tmp_path)
    assert calls(model, "linear_codes") == 13 and model.info.quantized == ("23 as int8/32/float16",)
    assert calls(model, "embedding_codes") == 1


def calls(model: CpuModel, op: str) -> int:
    """Calls of a native kernel in the compiled graph."""
    return model.report.stage_ops["lower"][op]


# Refusals.


@pytest.mark.parametrize(("asked", "config", "message"), [
    ("awq", None, "--quantization awq: config.json has no quantization_config, so its weights are plain; bitsandb"),
    ("awq", "gptq", "--quantization awq: the checkpoint's weights are quantized by gptq; leave the flag out"),
    ("int8", "gptq", "--quantization int8: the checkpoint's weights are quantized by gptq; leave the flag out"),
    (None, {"quant_method": "none_such"}, "its weights are quantized by none_such, which is not supported; supported"),
    (None, {"quant_method": "gptq", "bits": 5}, "gptq: bits 5 is not supported: it must be 2 or 3 or 4 or 8"),
    (None, {"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq: version 'gemv' is not supported"),
    (None, {"quant_method": "compressed-tensors", "format": "sparse-bitmask", "config_groups": {"a": {}}},
     "compressed-tensors: format 'sparse-bitmask' is not supported: it must be pack-quantized or"),
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


@pytest.mark.parametrize(("asked", "dtype", "config", "message"), [
    (None, "float32", "gptq", "--dtype float32: weights of gptq_marlin are computed with in float16 or bfloat16"),
    ("gptq", "bfloat16", "gptq", "--dtype bfloat16: weights of gptq are computed with in float16; leave the flag out"),
    ("awq_marlin", "bfloat16", "awq", ""), (None, "bfloat16", "marlin", "--dtype bfloat16: weights of marlin"),
    (None, "float32", "nf4", ""), ("int4", "float32", None, ""), ("fp8", "float32", None, "--dtype float32: weights"),
], ids=str)  # fmt: skip
def test_a_dtype_that_a_method_has_not_is_refused(asked, dtype, config, message: str, tmp_path: Path) -> None:
    values = {"quantization_config": cases()[config].config} if config else {}
    (tmp_path / "config.json").write_text(json.dumps(values))
    settings = CompileConfig(str(tmp_path), quantization=asked, dtype=dtype)
    if not message:
        method_of(settings)
        return
    with pytest.raises(QuantizationError, match=re.escape(message)):
        method_of(settings)


@pytest.mark.parametrize(("file", "asked", "config", "name"), [
    ("hf_quant_config.json", None, {"quantization": {"quant_algo": "FP8"}}, "modelopt"),
    ("quantize_config.json", "gptq", {"bits": 4, "group_size": 32, "sym": True}, "gptq"),
    ("quantize_config.json", "gptq", {"bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "marlin"),
    ("quant_config.json", "awq", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, "awq"),
    ("quant_config.json", "deepspeedfp", {"bits": 6, "group_size": 64}, "deepspeedfp"),
])  # fmt: skip
def test_a_config_beside_config_json_is_read(file: str, asked, config: dict, name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(config))
    settings = CompileConfig(str(tmp_path), quantization=asked)
    assert method_of(settings).name == name
    assert in_words(settings) == (name if asked in (None, name) else f"{name}, for --quantization {asked}")


@pytest.mark.parametrize(("own", "config", "layouts"), [
    ("gptq", {"dynamic": {r"+:.*\.1\.mlp\.up": {"bits": 8}, r"-:.*\.2\.": {}}}, {f"{UP}.weight": "int8/32/float16"}),
    ("auto-round", {"extra_config": {UP: {"bits": 8}, "model.layers.2.mlp.up_proj": {"bits": 16}}},
     {f"{UP}.weight": "int8/32/float16"}),
    ("quark-int4", {"layer_quant_config": {"*.1.*up_proj": {"weight": {"dtype": "int8", "qscheme": "per_group"}}}},
     {f"{UP}.weight": "int8/32/float32/zeros"}),
])  # fmt: skip
def test_modules_may_have_settings_of_their_own(own: str, config: dict, layouts: dict, tmp_path: Path) -> None:
    """Those of the config are int4; of a layer all weights but one are plain."""
    case = cases()[own]
    other = {"gptq": quantized.gptq(8), "auto-round": quantized.gptq(8)}.get(own) or quantized_packers.quark(
        "int8", "per_group")  # fmt: skip
    path, plain = quantized.checkpoint(case, tmp_path, ends=("layers.0.mlp.up_proj.weight",))
    state = load_file(path / "model.safetensors")
    tensors, values = other(state.pop(f"{UP}.weight").float())
    save_file(state | {UP + suffix: tensor.contiguous() for suffix, tensor in tensors.items()},
              path / "model.safetensors", {"format": "pt"})  # fmt: skip
    quantized.edit_config(path, quantization_config=case.config | config)
    stored = open_stored(CompileConfig(str(path)))
    coded = {name: one for name, one in stored.items() if isinstance(one, CodedTensor)}
    want = layouts | dict.fromkeys(plain, case.layout)
    assert {name: str(one.published.layout) for name, one in coded.items()} == want
    with Reader() as reader:
        found = reader.value(lazy_tensor.whole(coded[f"{UP}.weight"]))
    torch.testing.assert_close(found, values, rtol=2e-6, atol=1e-7)


def test_groups_of_a_config_may_have_formats_of_their_own(tmp_path: Path) -> None:
    """compressed-tensors of int4, of int8 and of fp8 in one checkpoint, and weights that stay plain."""
    names = {"w4a16": "up_proj.weight", "w8a8": "q_proj.weight", "ct-fp8": "down_proj.weight"}
    path, plain = quantized.checkpoint(cases()["w4a16"], tmp_path, ends=(names["w4a16"],))
    state, groups = load_file(path / "model.safetensors"), {}
    known = load_file(tmp_path / "plain" / "model.safetensors")
    for case, end in names.items():
        config = cases()[case].config
        groups[case] = config["config_groups"]["group_0"] | {"targets": [f"re:.*{end[:6]}"], "format": config["format"]}
        for name in [name for name in state if name.endswith(end)]:
            tensors, values = cases()[case].write(state.pop(name))
            state |= {name.removesuffix(".weight") + suffix: tensor.contiguous() for suffix, tensor in tensors.items()}
            known[name] = values.contiguous()
    save_file(state, path / "model.safetensors", {"format": "pt"})
    save_file(known, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    quantized.edit_config(path, quantization_config=cases()["w4a16"].config | {
        "format": "mixed-precision", "config_groups": groups})  # fmt: skip
    model = assert_tokens_are_those_of_transformers(tmp_path)
    assert set(model.info.quantized) == {"3 as int4/32/float32", "3 as int8/row/float32", "3 as fp8/row/float32"}


@pytest.mark.parametrize(("name", "config", "message"), [
    ("hqq", {"quant_config": {"weight_quant_params": {"nbits": 5}}}, "hqq: nbits 5 is not supported: it must be 1 or"),
    ("qqq", {"wbits": 8}, "qqq: wbits 8 is not supported"),
    ("nvfp4", {"quant_algo": "W4A16_AWQ"}, "modelopt: quant_algo 'W4A16_AWQ' is not supported: it must be FP8 or"),
    ("nvfp4", {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.b": {"quant_algo": "X"}}},
     "quant_algo of a.b 'X'"),
    ("quark-int8", {"global_quant_config": {"weight": {"dtype": "mx9"}}},
     "quark: global_quant_config: dtype of weights 'mx9' is not supported"),
    ("quark-int8", {"layer_quant_config": {"*.k": {"weight": [{}]}}}, "layer_quant_config of *.k: weights of several"),
    ("auto-round", {"packing_format": "mlx"}, "auto-round: packing_format 'mlx' is not supported"),
    ("auto-round", {"data_type": "mx_fp"}, "auto-round: data_type 'mx_fp' is not supported"),
    ("deepspeedfp-6", {"bits": 7}, "deepspeedfp: bits 7 is not supported: it must be 6 or 8 or 12"),
    ("marlin-24", {"bits": 2}, "gptq_marlin_24: bits 2 is not supported"),
    ("gptq", {"dynamic": {"x": {"bits": 6}}}, "gptq: bits 6 is not supported"),
    ("w4a16", {"sparsity_config": {"format": "sparse-24-bitmask"}},
     "compressed-tensors: format of sparsity_config 'sparse-24-bitmask' is not supported"),
], ids=str)  # fmt: skip
def test_unknown_schemes_are_named(name: str, config: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": cases()[name].config | config}))
    with pytest.raises(QuantizationError, match=re.escape(message)) as caught:
        method_of(CompileConfig(str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "change", "message"), [
    ("gptq", lambda s: s.pop(f"{UP}.scales"), f"{UP}: its tensors .g_idx, .qweight, .qzeros are not those of gptq"),
    ("gptq", lambda s: s[f"{UP}.scales"].fill_(torch.nan), f"{UP}.scales in .*safetensors has a value that is not f"),
    ("gptq", lambda s: s[f"{UP}.qzeros"].add_(1), "qzeros are not 8, as they are where config.json has sym true"),
    ("gptq", lambda s: s.update({f"{UP}.scales": s[f"{UP}.scales"][:1].clone()}), "its tensors do not fit together"),
    ("w4a16", lambda s: s[f"{UP}.weight_shape"].fill_(7), f"{UP}.weight in .* has shape .7, 7., but config.json"),
    ("ct-fp8", lambda s: s.pop(f"{UP}.weight_scale"), f"{UP}.weight is fp8 without a weight_scale"),
    ("w8a8", lambda s: s.pop(f"{UP}.weight_scale"), f"{UP}.weight is int8 without a weight_scale"),
    ("marlin", lambda s: s.update({f"{UP}.s": s[f"{UP}.s"][:1].clone()}), f"{UP}: its scales have shape .1, 96., but"),
    ("qqq", lambda s: s[f"{UP}.s_channel"].fill_(torch.inf), f"{UP}.s_channel in .* has a value that is not finite"),
    ("hqq", lambda s: s[f"{UP}.nbits"].fill_(7), f"safetensors: {UP}.nbits 7 is not supported: it must be 1 or 2"),
    ("hqq", lambda s: s[f"{UP}.quant_scale"].fill_(1), f"{UP}.quant_scale is set: scales and zeros that are quantized"),
    ("hqq", lambda s: s.update({f"{UP}.zero": s[f"{UP}.zero"][:5].clone()}), f"{UP}: 192 scales and 5 zeros do not"),
    ("aqlm-2x8", lambda s: s[f"{UP}.codebooks"].fill_(torch.nan), f"{UP}.codebooks in .* has a value that is not f"),
    ("aqlm-2x8", lambda s: s.update({f"{UP}.codebooks": s[f"{UP}.codebooks"][:1].clone()}), f"{UP}.codebooks has sha"),
    ("nvfp4", lambda s: s.pop(f"{UP}.weight_scale_2"), f"safetensors: {UP}.weight_scale has no .weight_scale_2"),
    ("nvfp4", lambda s: s.update({f"{UP}.pre_quant_scale": torch.ones(64)}), f"{UP}.pre_quant_scale: weights whose"),
    ("quark-int4", lambda s: s.pop(f"{UP}.weight_scale"), f"{UP}.weight is int32 without a weight_scale"),
    ("quark-int8", lambda s: s.update({f"{UP}.weight_scale": torch.ones(7)}), f"{UP}.weight_scale has shape .7., whi"),
    ("ct-nvfp4", lambda s: s.pop(f"{UP}.weight_scale"), f"{UP}.weight_packed has no weight_scale"),
    ("marlin-24", lambda s: s.update({f"{UP[:-7]}down_proj.B_meta": torch.zeros(1, 2, dtype=torch.int16)}),
     "down_proj.B_meta has shape .1, 2., which does not fit 64"),
    ("w8a8-static", lambda s: s[f"{UP}.input_scale"].zero_(), "input_scale is .0.0.: it must be above 0 and finite"),
])  # fmt: skip
def test_damaged_tensors_are_refused_by_name(name: str, change, message: str, tmp_path: Path) -> None:
    path, _ = quantized.checkpoint(cases()[name], tmp_path)
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=message) as caught:
        compile_model(CompileConfig(str(path), cache_dir=str(tmp_path), skip_model_check=True), detect_target())
    assert "\n" not in str(caught.value)


# Inputs of any integer weights, quantized by a flag.


@pytest.mark.parametrize("name", ("gptq-zeros", "w8a16"))
def test_a_flag_quantizes_inputs(name: str, tmp_path: Path) -> None:
    """Of codes as published: only what reads them changes."""
    quantized.checkpoint(cases()[name], tmp_path)
    tokens = cases()["w4a8"]
    model = assert_tokens_are_those_of_transformers(
        tmp_path, lambda plain: quantized.quantize_inputs(plain, tokens), activation_dtype="int8"
    )
    assert calls(model, "linear_codes_int8") == 12
    assert model.info.quantized == (f"21 as {cases()[name].layout}/a8",)


@pytest.mark.parametrize(("asked", "quantization", "message"), [
    (None, None, "--activation-dtype int8 needs weights of int8 or int4, and these are plain: give a checkpoint"),
    ("fp8", None, "--activation-dtype int8 needs weights of int8 or int4, and these are stored as fp8/row/float32"),
    (None, "nf4", "--activation-dtype int8 needs weights of int8 or int4, and these are stored as lut4/32/float32/nf4"),
])  # fmt: skip
def test_inputs_stay_plain_where_no_weight_is_of_integers(asked, quantization, message: str, tmp_path: Path) -> None:
    path = quantized.checkpoint(cases()[quantization], tmp_path)[0] if quantization else zoo.checkpoint("llama")
    with pytest.raises(CaptureError, match=re.escape(message)) as caught:
        optimize(CompileConfig(str(path), skip_model_check=True, quantization=asked, activation_dtype="int8"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("target", "settings"), [
    (CPU, {"level": 0}), (CPU, {"disabled_passes": ("pack_weights",)}), (Target("cuda", "sm_90", 1), {}),
], ids=str)  # fmt: skip
def test_inputs_are_quantized_on_a_cpu_only(target: Target, settings: dict, tmp_path: Path) -> None:
    path, _ = quantized.checkpoint(cases()["w8a16"], tmp_path)
    with pytest.raises(CaptureError, match="--activation-dtype int8 is for a CPU, from -O1 on and with the pass"):
        optimize(CompileConfig(str(path), skip_model_check=True, activation_dtype="int8", **settings), target)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.0105), ("int4", 0.084)])
def test_the_error_of_int8_inputs(kind: str, error: float) -> None:
    """Relative, of products of normal numbers with weights quantized as they are loaded: nearly that of the weights."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 576, generator=generator), torch.randn(256, 576, generator=generator)
    layout = parse_layout(online_layouts(CompileConfig("", quantization=kind), "bfloat16")[0])
    codes, scale = quantize_rows(x)
    found = codes * scale @ dequantize(encode(weight, layout), layout).T
    assert (found - x @ weight.T).norm() / (x @ weight.T).norm() < error


# Plain weights, quantized as they are loaded.


@pytest.mark.parametrize(("name", "share"), [
    ("int8", 0.36), ("fp8", 0.36), ("int4", 0.26), ("ptpc_fp8", 0.42), ("tpu_int8", 0.42), ("bitsandbytes", 0.31),
])  # fmt: skip
def test_plain_weights_are_quantized_as_they_are_loaded(name: str, share: float, tmp_path: Path) -> None:
    """The logits' weight too, and with it a tied embedding. `share`: of the plain weights' bytes."""
    plain = zoo.checkpoint("gemma2")
    reference = zoo.load(plain)
    size = sum(weight.nbytes for weight in {id(weight): weight for weight in reference.parameters()}.values())
    layout, _, of_head = online_layouts(CompileConfig("", quantization=name), "float32")
    with torch.no_grad():
        for module in reference.modules():
            if isinstance(module, torch.nn.Linear) and (of_head or module is not reference.lm_head):
                form = parse_layout(of_head if module is reference.lm_head else layout)
                module.weight.copy_(dequantize(encode(module.weight, form), form))
    config = CompileConfig(str(plain), cache_dir=str(tmp_path), skip_model_check=True, quantization=name)
    model = compile_model(config, detect_target())
    assert calls(model, "linear_codes") == 12 + bool(of_head) and calls(model, "embedding_codes") == bool(of_head)
    assert model.info.weight_bytes < size * share
    want = [zoo.continue_greedily(reference, prompt, 12)[0] for prompt in PROMPTS]
    assert greedy(model, PROMPTS, 12) == want


@pytest.mark.parametrize(("family", "name"), [
    ("mixtral", "int8"), ("gpt_oss", "int4"), ("qwen3_moe", "fp8"), ("mixtral", "experts_int8"),
])  # fmt: skip
def test_plain_experts_are_quantized_as_they_are_loaded(family: str, name: str, tmp_path: Path) -> None:
    """Also those that the checkpoint has transposed. Routers stay plain."""
    plain = zoo.checkpoint(family)
    reference = zoo.load(plain)
    linears, experts, of_head = online_layouts(CompileConfig("", quantization=name), "float32")
    with torch.no_grad():
        for module, weight in reference.named_parameters():
            layout = of_head if module.startswith("lm_head") else linears
            if layout and weight.ndim == 2 and "embed" not in module and not is_router(module):
                form = parse_layout(layout)
                weight.copy_(dequantize(encode(weight, form), form))
            for matrix in weight if weight.ndim == 3 else ():
                rows, form = matrix.mT if family == "gpt_oss" else matrix, parse_layout(experts)
                rows.copy_(dequantize(encode(rows, form), form))
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


def test_dequantized_values_are_of_no_layout() -> None:
    with pytest.raises(ValueError, match="is no layout of weights"):
        parse_layout("values/row/float32")


def test_nf4_of_plain_weights_is_that_of_bitsandbytes() -> None:
    from bitsandbytes import functional

    layout = parse_layout("lut4/64/float32/nf4")
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    weight[3, :64] = 0
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    want = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(dequantize(encode(weight, layout), layout), want, rtol=2e-6, atol=1e-7)
