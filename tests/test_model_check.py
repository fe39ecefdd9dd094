"""A model is compared with Transformers before its graph is trusted: once, in words, and whatever it hides."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from transformers import AutoModelForCausalLM

from fuseline.compile import check, compiler
from fuseline.compile.capture.errors import CaptureError, LoadError
from fuseline.compile.capture.small_config import small_config
from fuseline.compile.compiler import compile_model, optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.report import explain
from fuseline.compile.target import detect_target

LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "short_mscale": 1.2,
    "long_mscale": 1.3, "original_max_position_embeddings": 32,
}  # fmt: skip
PHIMOE = dict(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, num_local_experts=4, rope_scaling=LONGROPE,
)  # fmt: skip


@pytest.fixture
def save(tmp_path: Path):
    """Saves a config alone, which is all that a check needs."""

    def make(config, **settings: object) -> CompileConfig:
        config.save_pretrained(tmp_path / "model")
        return CompileConfig(str(tmp_path / "model"), cache_dir=str(tmp_path / "cache"), **settings)

    return make


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "deepseek_v3", "gpt_oss", "phi3_longrope"])
def test_right_models_pass(save, family: str) -> None:
    captured, _ = optimize(save(zoo.config_of(family)))
    assert captured.verdict.startswith("checked: a copy of"), captured.verdict


def test_a_model_whose_factors_follow_its_batch_is_refused(save) -> None:
    """PhiMoE scales cos and sin by the longest position of a batch, which a serving graph does not know."""
    config = save(transformers.PhimoeConfig(**PHIMOE))
    with pytest.raises(CaptureError, match=r"phimoe would answer wrongly.*from token \d+ on.*--skip-model-check"):
        optimize(config)


def test_the_check_can_be_skipped(save) -> None:
    captured, _ = optimize(save(transformers.PhimoeConfig(**PHIMOE), skip_model_check=True))
    assert captured.verdict == ""


@pytest.mark.parametrize("broken", ["window", "order", "scale"])
def test_a_serving_graph_that_computes_something_else_is_refused(save, monkeypatch, broken: str) -> None:
    """Each fault is put into the graph behind capture, where no code of a model is to blame."""
    attention = torch.ops.fuseline.paged_attention.default
    run_passes = compiler._run_passes

    def faulty(captured, config, target):
        result = run_passes(captured, config, target)
        for node in captured.graph.graph.find_nodes(op="call_function", target=attention):
            args = list(node.args)
            if broken == "window":
                args[7] = 7 if args[7] == 0 else 0
            elif broken == "scale":
                args[8] *= 1.01
            else:
                args[4] = args[5]  # lengths of other sequences
            node.args = tuple(args) if broken != "order" else node.args
        if broken == "order":
            for node in captured.graph.graph.find_nodes(op="call_function", target=torch.ops.fuseline.rms_norm.default):
                node.args = (*node.args[:2], 0.5, *node.args[3:])
        return result

    monkeypatch.setattr(compiler, "_run_passes", faulty)
    with pytest.raises(CaptureError, match="llama would answer wrongly"):
        optimize(save(zoo.config_of("llama")))


def test_the_verdict_is_kept_with_the_graph(save, monkeypatch) -> None:
    config = save(zoo.config_of("llama"))
    first, _ = optimize(config)
    monkeypatch.setattr(compiler, "check_model", lambda *args: pytest.fail("checked again"))
    second, _ = optimize(config)
    assert second.verdict == first.verdict != ""
    assert first.verdict in explain(config)


def test_other_sources_of_the_compiler_check_again(save, monkeypatch) -> None:
    config, asked = save(zoo.config_of("llama")), []
    optimize(config)
    monkeypatch.setattr("fuseline.compile.capture.artifact.sources_key", lambda: "other")
    monkeypatch.setattr(compiler, "check_model", lambda *args: asked.append(args) or "checked: again")
    assert optimize(config)[0].verdict == "checked: again" and len(asked) == 1


def test_a_copy_that_cannot_be_compared_is_served_with_a_warning(save, monkeypatch, caplog) -> None:
    def refuse(*args):
        raise check._NotComparable("no copy is small enough")

    monkeypatch.setattr(check, "_both", refuse)
    captured, _ = optimize(save(zoo.config_of("llama")))
    assert captured.verdict == "not checked: no copy is small enough"
    assert "served without a comparison" in caplog.text


def test_a_copy_keeps_what_a_model_is() -> None:
    config = transformers.Gemma3TextConfig(num_hidden_layers=12, sliding_window=512, head_dim=256)
    small = small_config(config, 7)
    assert small.num_hidden_layers == 7 and small.layer_types == config.layer_types[:7]
    assert small.sliding_window <= 8 and small.vocab_size <= 256 and small.hidden_size < config.hidden_size
    ratio = config.num_attention_heads / config.num_key_value_heads
    assert small.num_attention_heads / small.num_key_value_heads == ratio


@pytest.mark.parametrize(
    "model_type, words",
    [
        ("JetMoeConfig", "jetmoe"), ("RoCBertConfig", "roc_bert"), ("BartConfig", "encoder-decoder|bart"),
        ("XLMConfig", r"xlm: in \d+ of \d+ layers"), ("DogeConfig", "attention_mask"),
    ],
)
def test_what_cannot_be_captured_is_refused_in_one_line(save, model_type: str, words: str) -> None:
    config = getattr(transformers, model_type)()
    with pytest.raises(CaptureError, match=words) as caught:
        optimize(save(config))
    assert "\n" not in str(caught.value) and not re.search(r"in -\d", str(caught.value))


@pytest.mark.parametrize(
    "text, words",
    [("{", "not a JSON object"), ("[1]", "not a JSON object"), ('{"eos_token_id": "x"}', "eos_token_id is 'x'"),
     ('{"eos_token_id": [1, 2.5]}', "eos_token_id is"), ('{"eos_token_id": true}', "eos_token_id is True")],
)  # fmt: skip
def test_a_broken_generation_config_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "model"
    path.mkdir()
    for file in zoo.checkpoint("llama", "float32").iterdir():
        (path / file.name).symlink_to(file)
    (path / "generation_config.json").unlink(missing_ok=True)
    (path / "generation_config.json").write_text(text)
    with pytest.raises(LoadError, match=words):
        compile_model(CompileConfig(str(path)), detect_target())


def test_weights_of_float64_are_served(tmp_path: Path) -> None:
    """In the dtype that is asked for; stored as such a model's own dtype it is float32."""
    config = zoo.config_of("llama")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.get("dtype", stored.get("torch_dtype")) == "float64"
    compiled = compile_model(CompileConfig(str(tmp_path), cache_dir=str(tmp_path / "cache")), detect_target())
    tokens = torch.randint(8, 100, (9,))
    found = check.serve(compiled, [tokens], 16)[0] if compiled.info.dtype == "float32" else None
    expected = model(tokens[None]).logits[0].float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
