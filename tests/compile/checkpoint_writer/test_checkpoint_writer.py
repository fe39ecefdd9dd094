"""Checkpoints that `fuseline quantize` writes: Transformers with compressed-tensors reads the weights that we read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import zoo
from paged_driver import greedy
from quantized import edit_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.checkpoint import CodedTensor
from fuseline.compile.capture.coded import open_stored
from fuseline.compile.capture.errors import CaptureError, LoadError
from fuseline.compile.capture.reader import Reader
from fuseline.compile.checkpoint_writer import plan as plans
from fuseline.compile.checkpoint_writer import write
from fuseline.compile.checkpoint_writer.measure import measure, table
from fuseline.compile.checkpoint_writer.plan import make_plan
from fuseline.compile.checkpoint_writer.write import write_quantized
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.formats.encode import encode
from fuseline.compile.ops.coded import dequantize, parse_layout
from fuseline.compile.target import detect_target

PROMPTS = zoo.make_prompts([3, 11])
UP, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("up", "down"))


@pytest.mark.parametrize(("target", "dtype", "layouts"), [
    ("int4", "float32", {UP: "int4/32/float32", DOWN: "int4/32/float32"}),
    ("int8", "float32", {UP: "int8/32/float32", DOWN: "int8/32/float32"}),
    ("fp8", "bfloat16", {UP: "fp8/row/bfloat16", DOWN: "fp8/row/bfloat16"}),
])  # fmt: skip
def test_transformers_and_fuseline_read_it(target: str, dtype: str, layouts: dict, tmp_path: Path) -> None:
    """64 inputs and 96: groups of 32 divide both."""
    source, path = zoo.checkpoint("llama", dtype), tmp_path / "out"
    num_bytes = write_quantized(make_plan(CompileConfig(str(source)), target), path)
    assert num_bytes == sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
    assert {file.name for file in path.iterdir()} == {file.name for file in source.iterdir()}
    stored = open_stored(CompileConfig(str(path)))
    assert sum(isinstance(tensor, CodedTensor) for tensor in stored.values()) == 21
    reference = AutoModelForCausalLM.from_pretrained(path).eval()
    plain = load_file(source / "model.safetensors")
    with Reader() as reader:
        for module, name in layouts.items():
            assert str(stored[f"{module}.weight"].published.layout) == name
            layout = parse_layout(name)
            want = dequantize(encode(plain[f"{module}.weight"], layout), layout)
            found = reader.value(lazy_tensor.whole(stored[f"{module}.weight"]))
            torch.testing.assert_close(found, want, rtol=0, atol=0)
    ids = torch.tensor([PROMPTS[1]])
    known = zoo.load(source)
    with torch.no_grad():
        for name, module in known.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                form = stored[f"{name}.weight"].published.layout
                module.weight.copy_(dequantize(encode(plain[f"{name}.weight"], form), form))
        error = 1e-4 if dtype == "float32" else 0.1
        torch.testing.assert_close(reference(ids).logits.float(), known(ids).logits.float(), rtol=error, atol=error)
    if target == "int4":
        want = [zoo.continue_greedily(known, prompt, 12)[0] for prompt in PROMPTS]
        config = CompileConfig(str(path), cache_dir=str(tmp_path), skip_model_check=True)
        assert greedy(compile_model(config, detect_target()), PROMPTS, 12) == want


def test_files_beside_the_weights_are_copied(tmp_path: Path) -> None:
    """Chat templates in a directory of their own too; neither weights of other formats nor hidden files."""
    source, path = tmp_path / "in", tmp_path / "out"
    shutil.copytree(zoo.checkpoint("llama"), source)
    (source / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tools.jinja", "code.py", "old.bin", "pytorch_model.bin.index.json", ".git"):
        (source / name).write_text("{}")
    write_quantized(make_plan(CompileConfig(str(source)), "int8"), path)
    names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    own = {file.name for file in zoo.checkpoint("llama").iterdir()}
    assert names == own | {"additional_chat_templates/tools.jinja", "code.py"}


def test_experts_are_quantized_and_what_no_group_divides_has_a_scale_a_row(tmp_path: Path, monkeypatch) -> None:
    """Of 64 and 96 inputs groups of 64 divide the former: two groups of the config."""
    monkeypatch.setitem(plans.GROUPS, "int8", (64,))
    source, path = zoo.checkpoint("mixtral"), tmp_path / "out"
    plan = make_plan(CompileConfig(str(source)), "int8", ("lm_head", "*.layers.2.*.w2"))
    write_quantized(plan, path)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["strategy"] for group in config["config_groups"].values()} == {"group", "channel"}
    assert sum(layout.group == 0 for layout in plan.layouts.values()) == 8 and len(plan.ignored) == 5
    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    state = load_file(plain / "model.safetensors")
    for name, layout in plan.layouts.items():
        state[name] = dequantize(encode(state[name], layout), layout)
    save_file(state, plain / "model.safetensors", {"format": "pt"})
    reference = zoo.load(plain)
    want = [zoo.continue_greedily(reference, prompt, 12)[0] for prompt in PROMPTS]
    model = compile_model(CompileConfig(str(path), cache_dir=str(tmp_path), skip_model_check=True), detect_target())
    assert greedy(model, PROMPTS, 12) == want


def test_transformers_reads_experts(tmp_path: Path) -> None:
    source, path = zoo.checkpoint("mixtral"), tmp_path / "out"
    plan = make_plan(CompileConfig(str(source)), "int4")
    write_quantized(plan, path)
    state = AutoModelForCausalLM.from_pretrained(path).state_dict()
    stored, name = load_file(source / "model.safetensors"), "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    want = dequantize(encode(stored[name], plan.layouts[name]), plan.layouts[name])
    torch.testing.assert_close(state["model.layers.1.mlp.experts.down_proj"][2], want, rtol=1e-6, atol=1e-6)


def test_globs_leave_linears_plain_and_files_have_an_index(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(write, "FILE_BYTES", 20_000)
    plan = make_plan(CompileConfig(str(zoo.checkpoint("llama"))), "int4", ("*.layers.0.*", "down_proj"))
    told = []
    write_quantized(plan, tmp_path / "out", lambda *args: told.append(args))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(config["ignore"]) == 9 and "lm_head" not in config["ignore"]
    stored = open_stored(CompileConfig(str(tmp_path / "out")))
    assert {name for name, one in stored.items() if isinstance(one, CodedTensor)} == set(plan.layouts)
    assert len(plan.layouts) == 13 and len({one.path for one in stored.values()}) > 3
    assert told[-1] == ("quantizing", len(plan.stored), len(plan.stored))


def test_errors_are_those_of_the_weights_and_of_outputs(tmp_path: Path) -> None:
    """A weight with an outlier in each group loses most; the worst outputs come first."""
    source = tmp_path / "model"
    shutil.copytree(zoo.checkpoint("llama"), source)
    state = load_file(source / "model.safetensors")
    weight = state[f"{UP}.weight"]
    weight[:, ::32] *= 40
    save_file(state, source / "model.safetensors", {"format": "pt"})
    plan = make_plan(CompileConfig(str(source)), "int4")
    errors = measure(plan, texts=("hello", "what is this?"))
    assert len(errors) == 21 and [e.output for e in errors] == sorted((e.output for e in errors), reverse=True)
    found = {error.name: error for error in errors}
    layout = plan.layouts[f"{UP}.weight"]
    lost = dequantize(encode(weight, layout), layout) - weight
    assert found[f"{UP}.weight"].weight == pytest.approx((lost.norm() / weight.norm()).item(), rel=1e-4)
    assert 0.05 < found[f"{DOWN}.weight"].weight < 0.1 and 0 < found[f"{DOWN}.weight"].output < 0.2
    lines = table(errors).splitlines()
    assert len(lines) == 23 and lines[1].startswith(errors[0].name) and lines[-1].startswith("mean")


def test_what_cannot_be_quantized_is_refused_in_one_line(tmp_path: Path) -> None:
    source, path = tmp_path / "model", tmp_path / "out"
    shutil.copytree(zoo.checkpoint("llama"), source)
    config = CompileConfig(str(source))
    with pytest.raises(CaptureError, match="has no linear to quantize: all of them are ignored"):
        make_plan(config, "int8", ("*",))
    state = load_file(source / "model.safetensors")
    state[f"{UP}.weight"][3, 5] = torch.nan
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=f"{UP}.weight in .*model.safetensors has a value that is not finite"):
        write_quantized(make_plan(config, "int4"), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model"], "nothing is left of what was begun"
    path.mkdir()
    with pytest.raises(LoadError, match="out is there already: give another --output"):
        write_quantized(make_plan(config, "int8"), path)
    edit_config(source, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CaptureError, match="is quantized already, by gptq: give the one that it was made of"):
        make_plan(config, "int8")
    (source / "config.json").unlink()
    with pytest.raises(CaptureError, match="has no config.json"):
        make_plan(config, "int8")
