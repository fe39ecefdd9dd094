"""Models in GGUF files: their weights are those of the package `gguf`, their tokens those of Transformers on them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import gguf
import gguf_files
import numpy as np
import pytest
import torch
import zoo
from gguf_files import all_of, in_turn
from paged_driver import greedy
from safetensors.torch import load_file

from fuseline.compile import compiler
from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.coded import open_stored
from fuseline.compile.capture.errors import CaptureError, LoadError
from fuseline.compile.capture.reader import Reader
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.gguf.folder import find_gguf, unpacked
from fuseline.compile.gguf.header import GgufError
from fuseline.compile.gguf.rope import factors_of_wavelengths
from fuseline.compile.quantization.methods import method_of
from fuseline.compile.target import detect_target

PROMPTS = zoo.make_prompts([3, 11])
UP = "blk.1.ffn_up.weight"


def config_of(path: Path, **settings: object) -> CompileConfig:
    folder = unpacked(find_gguf(path), path.parent / "cache")
    return CompileConfig(**{
        "model": str(folder), "cache_dir": str(path.parent), "skip_model_check": True, "dtype": "float32", **settings
    })  # fmt: skip


def assert_weights_are_those_of_the_package(path: Path) -> None:
    stored, want = open_stored(config_of(path)), load_file(path.parent / "plain" / "model.safetensors")
    assert stored.keys() == want.keys()
    with Reader() as reader:
        for name, value in want.items():
            assert torch.equal(reader.value(lazy_tensor.whole(stored[name])).to(value.dtype), value), name


def assert_tokens_are_those_of_transformers(path: Path, prompts=PROMPTS, **settings: object) -> CpuModel:
    reference = zoo.load(path.parent / "plain")
    want = [zoo.continue_greedily(reference, prompt, 12)[0] for prompt in prompts]
    model = compile_model(config_of(path, **settings), detect_target())
    assert greedy(model, prompts, 12) == want
    return model


@pytest.mark.parametrize(("types", "widths", "layouts"), [
    (("Q8_0",), 1, {"int8/32/float16"}),
    (("Q4_0",), 1, {"int4/32/float16"}),
    (("Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4"), 1, {
        "uint4/32/float16/zeros", "int8/32/float16/5bit", "uint8/32/float16/zeros/5bit", "lut4/32/float16/iq4nl",
        "lut4/32/float32/e2m1"}),
    (("Q4_K",), 4, {"uint4/32/float32/zeros"}),
    (("Q6_K", "Q4_K", "Q5_K"), 4, {"int8/16/float32", "uint4/32/float32/zeros", "uint8/32/float32/zeros/5bit"}),
    (("IQ4_XS", "Q3_K"), 4, {"lut4/32/float32/iq4nl", "int4/16/float32"}),
], ids=["Q8_0", "Q4_0", "blocks of 32", "Q4_K", "K-quants", "IQ4_XS and Q3_K"])  # fmt: skip
def test_every_type_of_blocks(types: tuple[str, ...], widths: int, layouts: set[str], tmp_path: Path) -> None:
    path = gguf_files.checkpoint(tmp_path, types=in_turn(*types), widths=widths)
    assert_weights_are_those_of_the_package(path)
    model = assert_tokens_are_those_of_transformers(path)
    assert {line.partition(" as ")[2] for line in model.info.quantized} == layouts
    assert sum(int(line.split()[0]) for line in model.info.quantized) == 23, "embedding and logits as well"


def test_codes_of_5_bits_are_read_as_8_where_inputs_are_int8(tmp_path: Path) -> None:
    path = gguf_files.checkpoint(tmp_path, types=in_turn("Q5_0"))
    plain, coded = (compile_model(config_of(path, activation_dtype=kind), detect_target()) for kind in ("auto", "int8"))
    layouts = [{line.partition(" as ")[2] for line in model.info.quantized} for model in (plain, coded)]
    assert layouts[0] == {"int8/32/float16/5bit"} and "int8/32/float16/a8" in layouts[1]
    assert greedy(coded, PROMPTS, 2) == greedy(plain, PROMPTS, 2)


def test_types_without_a_layout_are_dequantized(tmp_path: Path) -> None:
    """Which the table at the start says."""
    path = gguf_files.checkpoint(tmp_path, types=in_turn("TQ1_0", "Q8_0"), widths=4)
    assert_weights_are_those_of_the_package(path)
    model = compile_model(config_of(path), detect_target())
    assert set(model.info.quantized) == {"12 dequantized as they are loaded", "11 as int8/32/float16"}


@pytest.mark.parametrize("family", (
    "llama3_rope llama_yarn mistral qwen2 qwen3 gemma gemma2 gemma3 phi3 mixtral qwen2_moe qwen3_moe").split())
def test_every_architecture(family: str, tmp_path: Path) -> None:
    path = gguf_files.checkpoint(tmp_path, family)
    assert_weights_are_those_of_the_package(path)
    assert_tokens_are_those_of_transformers(path)


def test_rope_that_changes_with_the_length(tmp_path: Path) -> None:
    path = gguf_files.checkpoint(tmp_path, "phi3_longrope")
    assert_tokens_are_those_of_transformers(path, zoo.make_prompts([11, 70]))


@pytest.mark.parametrize("kind", ("F32", "F16", "BF16"))
def test_plain_floats(kind: str, tmp_path: Path) -> None:
    path = gguf_files.checkpoint(tmp_path, types=all_of(kind))
    assert_weights_are_those_of_the_package(path)
    stored = json.loads((Path(config_of(path).model) / "config.json").read_text())
    assert "quantization_config" not in stored
    assert stored["dtype"] == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind]
    assert method_of(config_of(path, quantization="gguf")) is None


def test_plain_floats_can_be_quantized_as_they_are_loaded(tmp_path: Path) -> None:
    path = gguf_files.checkpoint(tmp_path, types=all_of("F16"))
    model = compile_model(config_of(path, quantization="int8"), detect_target())
    assert model.info.quantized == ("22 as int8/128/float32",)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    path = gguf_files.checkpoint(tmp_path, "qwen3", shards=3)
    assert len(list(tmp_path.glob("*.gguf"))) == 3
    assert_weights_are_those_of_the_package(path)
    assert_tokens_are_those_of_transformers(path.with_name("qwen3-00002-of-00003.gguf"))


def test_an_embedding_that_is_the_logits_too_is_one_copy(tmp_path: Path) -> None:
    path = gguf_files.checkpoint(tmp_path, "gemma2", types=all_of("Q4_0"))
    model = assert_tokens_are_those_of_transformers(path)
    calls = model.report.stage_ops["lower"]
    assert calls["embedding_codes"] == 1 and calls["linear_codes"] == 13 and "linear_panels" not in calls


def test_half_precision_is_what_quantized_files_are_computed_in(tmp_path: Path) -> None:
    path = gguf_files.checkpoint(tmp_path, types=in_turn("Q4_K", "Q6_K"), widths=4)
    model = assert_tokens_are_those_of_transformers(path, dtype="auto")
    assert model.info.dtype == "bfloat16"


def test_a_warm_start_reads_neither_header_nor_modules(tmp_path: Path, monkeypatch) -> None:
    path = gguf_files.checkpoint(tmp_path)
    first = compile_model(config_of(path), detect_target())
    monkeypatch.setattr(compiler, "layouts_of", None)
    monkeypatch.setattr("fuseline.compile.gguf.folder.read_model", None)
    again = compile_model(config_of(path), detect_target())
    assert again.info == first.info and greedy(again, PROMPTS, 4) == greedy(first, PROMPTS, 4)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "plain")
    gguf_files.checkpoint(tmp_path, types=all_of("Q4_0"))
    assert compile_model(config_of(path), detect_target()).info.quantized == ("23 as int4/32/float16",)


def test_the_config_of_another_directory_counts(tmp_path: Path) -> None:
    """But for how the weights are stored."""
    path = gguf_files.checkpoint(tmp_path)
    model = assert_tokens_are_those_of_transformers(path, hf_config_path=str(tmp_path / "plain"))
    assert model.info.quantized == ("23 as int8/32/float16",)


# Settings.


def settings_of(folder: Path, family: str = "llama", **settings: object) -> dict[str, dict]:
    """The files that are made of a GGUF file, with further settings."""
    path = gguf_files.checkpoint(folder, family, settings=settings)
    made = unpacked(path, folder / "cache")
    return {file.name: json.loads(file.read_text()) for file in made.glob("*.json")}


def test_tokens_that_end_an_answer_and_how_to_sample(tmp_path: Path) -> None:
    tokens = [f"w{index}" for index in range(126)] + ["<|im_end|>", "<|end|>"]
    made = settings_of(tmp_path, **{
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 126 + [3, 1],
        "tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}", "tokenizer.chat_template.tool_use": "{{ tools }}",
        "general.sampling.temp": 0.5, "general.sampling.top_k": 20,
    })  # fmt: skip
    assert made["generation_config.json"] == {
        "bos_token_id": 0, "eos_token_id": [5, 7, 126], "temperature": 0.5, "top_k": 20
    }  # fmt: skip
    assert made["config.json"]["eos_token_id"] == 5
    assert made["tokenizer_config.json"]["chat_template"] == [
        {"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"}
    ]  # fmt: skip


def test_factors_of_llama_3_are_known_and_others_kept(tmp_path: Path) -> None:
    """Those of the published models are a llama3 again; the zoo's, of another original length, stay factors."""
    made = settings_of(tmp_path, "llama3_rope")["config.json"]["rope_parameters"]
    assert made["rope_type"] == "longrope" and made["attention_factor"] == 1.0
    scaled = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    header = gguf_files.rope_tensors({"rope_parameters": scaled, "head_dim": 128})
    assert factors_of_wavelengths(header["rope_freqs.weight"].tolist(), 128, 500000.0, 131072) == {
        name: value for name, value in scaled.items() if name != "rope_theta"
    }  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), [
    ({"llama.attention.head_count_kv": [1, 2, 2]}, "llama.attention.head_count_kv differs from layer to layer"),
    ({"llama.block_count": "three"}, "llama.block_count is 'three': it must be a number"),
    ({"llama.rope.scaling.type": "ntk"}, "rope.scaling.type 'ntk' is not supported"),
    ({"llama.attention.value_length": 8}, "keys and values of different sizes"),
    ({"general.architecture": "mamba"}, "general.architecture 'mamba' is not supported in GGUF files; supported"),
], ids=str)  # fmt: skip
def test_settings_that_are_not_known_are_refused_in_one_line(settings: dict, message: str, tmp_path: Path) -> None:
    path = gguf_files.checkpoint(tmp_path, settings=settings)
    with pytest.raises(GgufError, match=f"llama.gguf.*{re.escape(message)}") as caught:
        unpacked(path, tmp_path / "cache")
    assert "\n" not in str(caught.value)


# Damaged files.


def rewrite(path: Path, change) -> None:
    """Writes the file anew, with other tensors: change(name -> (values, type))."""
    reader = gguf.GGUFReader(path)
    tensors = {one.name: (np.array(one.data), one.tensor_type) for one in reader.tensors}
    change(tensors)
    made = path.with_name("made")
    writer = gguf.GGUFWriter(made, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            gguf_files.add_setting(writer, name, field.contents())
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made.rename(path)


@pytest.mark.parametrize(("family", "joined", "names", "dim"), [
    ("llama", "attn_qkv", ("attn_q", "attn_k", "attn_v"), 0),
    ("qwen3_moe", "ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps"), 1),
])  # fmt: skip
def test_tensors_that_were_joined_are_parted(
    family: str, joined: str, names: tuple[str, ...], dim: int, tmp_path: Path
) -> None:
    def join(tensors: dict) -> None:
        for layer in range(3):
            parts = [tensors.pop(f"blk.{layer}.{name}.weight") for name in names]
            values = np.concatenate([values for values, _ in parts], dim)
            tensors[f"blk.{layer}.{joined}.weight"] = values, parts[0][1]

    path = gguf_files.checkpoint(tmp_path, family)
    rewrite(path, join)
    assert_weights_are_those_of_the_package(path)


def put(name: str, at: tuple, value: object):
    def change(tensors: dict) -> None:
        tensors[name][0][at] = value

    return change


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop(UP), "model.layers.1.mlp.up_proj.weight is not in the weights"),
    (lambda t: t.pop("output_norm.weight"), "model.norm.weight is not in the weights"),
    (lambda t: t.update({UP: (t[UP][0][:-1], t[UP][1])}), f"{UP} (model.layers.1.mlp.up_proj.weight) in .*gguf has sh"),
    (lambda t: t.update({"blk.0.odd.weight": t[UP]}), "blk.0.odd.weight in .*gguf, of shape [96, 64], is no tensor of"),
    (put(UP, (3, slice(0, 2)), (0, 0x7E)), f"{UP} (model.layers.1.mlp.up_proj.weight) in .*gguf has a scale that is"),
    (put("output_norm.weight", (3,), np.nan), "output_norm.weight (model.norm.weight) in .*gguf has a value that is n"),
    (put("blk.2.attn_norm.weight", (3,), np.inf), "blk.2.attn_norm.weight (model.layers.2.input_layernorm.weight) in"),
])  # fmt: skip
def test_damaged_tensors_are_refused_by_name(change, message: str, tmp_path: Path) -> None:
    path = gguf_files.checkpoint(tmp_path)
    rewrite(path, change)
    with pytest.raises((LoadError, CaptureError), match=re.escape(message).replace(r"\.\*", ".*")) as caught:
        compile_model(config_of(path), detect_target())
    assert "\n" not in str(caught.value)


def test_random_weights_need_the_settings_only(tmp_path: Path) -> None:
    path = gguf_files.checkpoint(tmp_path)
    model = compile_model(config_of(path, load_format="dummy"), detect_target())
    assert model.info.num_layers == 3 and model.info.quantized == ()


def test_another_load_format_is_refused(tmp_path: Path) -> None:
    path = gguf_files.checkpoint(tmp_path)
    with pytest.raises(LoadError, match="weights are in GGUF files, not in those of safetensors"):
        open_stored(config_of(path, load_format="safetensors"))
    with pytest.raises(LoadError, match="is a checkpoint of Transformers: give a file that ends in .gguf"):
        open_stored(CompileConfig(str(tmp_path / "plain"), load_format="gguf"))
