"""Capture: what a graph looks like, and one clear line for every model that is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import zoo
from torch import SymInt, fx
from transformers import AutoModelForCausalLM

from fuseline.compile.capture import hf_recurrences
from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.capture.export import CapturedModel, capture_config, capture_model, resolve_dtype
from fuseline.compile.capture.hf_model import load_config
from fuseline.compile.config import CompileConfig

ATTENTION = torch.ops.fuseline.attention.default
SMALL = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=128)


def capture(folder, family: str, **settings) -> CapturedModel:
    zoo.config_of(family).save_pretrained(folder)
    return capture_model(CompileConfig(model=str(folder), **settings))


def attentions(captured: CapturedModel) -> list[fx.Node]:
    return [node for node in captured.graph.graph.nodes if node.target is ATTENTION]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_graph_is_as_its_contract_says(tmp_path, family):
    captured = capture(tmp_path, family)
    nodes = list(captured.graph.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    assert [node.name for node in inputs] == ["token_ids", "positions"]
    rows, tokens = inputs[0].meta["val"].shape
    assert rows == 1 and isinstance(tokens, SymInt)
    assert tuple(nodes[-1].args[0].meta["val"].shape) == (1, tokens, zoo.VOCAB)
    assert [node.args[4] for node in attentions(captured)] == list(range(len(attentions(captured))))
    for node in nodes:
        assert node.meta.keys() - {"is_embedded"} == {"val"} | ({"fqn"} if node.op == "get_attr" else set())
        if node.op == "get_attr":
            name = node.meta["fqn"]
            known = name in captured.parameters or name in captured.constants or name in captured.tied
            assert known and node.meta["val"].device.type == "meta"
    assert [node.meta["val"].shape[1] for node in nodes if node.meta.get("is_embedded")] == [tokens]


def test_parameters_are_those_of_the_module(tmp_path):
    captured = capture(tmp_path, "qwen3_moe", dtype="bfloat16")
    assert {node.meta["val"].dtype for node in captured.graph.graph.nodes if "fqn" in node.meta} >= {torch.bfloat16}
    model = AutoModelForCausalLM.from_config(zoo.config_of("qwen3_moe"), dtype=torch.bfloat16)
    assert captured.parameters == {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    assert captured.dtype == torch.bfloat16
    assert captured.tied == {}


def test_what_transformers_keeps_in_float32_is_kept(tmp_path):
    captured = capture(tmp_path, "deepseek_v3", dtype="bfloat16")
    kept = {name for name, value in captured.constants.items() if value.dtype == torch.float32}
    assert {name for name in captured.constants if name.endswith("e_score_correction_bias")} <= kept
    wide = {name for name, (_, dtype) in captured.parameters.items() if dtype == torch.float32}
    assert wide and wide == {name for name in captured.parameters if name.endswith("mlp.gate.weight")}
    assert {dtype for _, dtype in captured.parameters.values()} == {torch.bfloat16, torch.float32}


def test_buffers_have_the_values_of_the_module(tmp_path):
    captured = capture(tmp_path, "llama_yarn")
    buffers = dict(AutoModelForCausalLM.from_config(zoo.config_of("llama_yarn")).named_buffers())
    assert captured.constants
    assert all(torch.equal(value, buffers[name]) for name, value in captured.constants.items())


def test_windows_and_layer_types(tmp_path):
    assert [node.args[6] for node in attentions(capture(tmp_path, "gemma3"))] == [8, 0, 8]
    assert [node.args[6:8] for node in attentions(capture(tmp_path, "gemma2"))] == [(8, 50.0), (0, 50.0), (8, 50.0)]


def test_tied_embeddings_and_overrides(tmp_path):
    assert capture(tmp_path, "gemma2").tied == {"lm_head.weight": "model.embed_tokens.weight"}
    untied = capture(tmp_path, "gemma2", hf_overrides=(("tie_word_embeddings", False), ("num_hidden_layers", 2)))
    assert untied.tied == {} and len(attentions(untied)) == 2


@pytest.mark.parametrize(
    ("asked", "stored", "found"),
    [
        ("auto", "float32", torch.float32),
        ("auto", "bfloat16", torch.bfloat16),
        ("auto", "float16", torch.bfloat16),
        ("float16", "bfloat16", torch.float16),
    ],
)
def test_dtype(tmp_path, asked, stored, found):
    zoo.config_of("llama").save_pretrained(tmp_path)
    config = CompileConfig(model=str(tmp_path), dtype=asked, hf_overrides=(("dtype", stored),))
    assert resolve_dtype(config, load_config(config)) == found


NOT_HOOKED = "does not go through Transformers' attention interface and would be computed without a KV cache"
REFUSED = {
    "roformer": (zoo.config_of("roformer"), rf"roformer: in 3 of 3 layers its attention {NOT_HOOKED}"),
    "t5": (transformers.T5Config(d_model=64, num_layers=2), "t5 is an encoder-decoder model"),
    "bart": (transformers.BartConfig(d_model=64), "bart is an encoder-decoder model"),
    "bert": (transformers.BertConfig(**SMALL), "bert attends to later tokens too"),
    "clip": (transformers.CLIPConfig(), "Transformers has no model of type clip that generates text"),
    "deepseek_v4": (transformers.DeepseekV4Config(), "deepseek_v4 has layers of type compressed_sparse_attention"),
    "activation": (transformers.LlamaConfig(**SMALL, hidden_act="nope"), "llama cannot be built: KeyError 'nope'"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_models_that_are_refused(tmp_path, name):
    config, message = REFUSED[name]
    config.save_pretrained(tmp_path)
    with pytest.raises(CaptureError, match=f"^{message}") as caught:
        capture_model(CompileConfig(model=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_recurrence_that_is_not_known_is_refused(monkeypatch):
    """A convolution is captured without complaint, and would begin anew in every step."""
    monkeypatch.setattr(hf_recurrences, "BY_NAME", {})
    layers = dict(layer_types=["conv", "full_attention", "conv"], num_hidden_layers=3)
    config = transformers.Lfm2Config(**SMALL | layers)
    with pytest.raises(CaptureError, match="^lfm2: in 2 of 2 layers its recurrence is none that is known"):
        capture_config(config, torch.float32, CompileConfig(model=""))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r".* has no config.json; give a Transformers checkpoint"),
        ("{", r".*config.json cannot be read as JSON: Expecting property name"),
        ("[1]", r".*config.json is no JSON object; give a Transformers checkpoint"),
        ("{}", r".*config.json: Unrecognized model"),
        (
            '{"model_type": "wonder"}',
            r".*config.json: .*`wonder` but Transformers does not recognize this architecture",
        ),
        ('{"model_type": "wonder", "auto_map": {"AutoConfig": "a.B"}}', r".* trust it with --trust-remote-code"),
        ('{"model_type": "llama", "hidden_size": "wide"}', r".*config.json: .*expected int, got str"),
        ('{"model_type": "llama", "num_attention_heads": 0}', r".*config.json: .*by zero"),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "none_such"}}',
            "its weights are quantized by none_such, which is not supported; supported are aqlm, ",
        ),
    ],
)
def test_configs_that_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CaptureError, match=f"^{message}") as caught:
        capture_model(CompileConfig(model=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_mask_or_bias_of_the_models_own_is_never_dropped(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    def with_bias(attention):
        def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
            bias = hidden_states.new_zeros(1, 4, hidden_states.shape[1], hidden_states.shape[1])
            return attention(self, hidden_states, position_embeddings, bias, **kwargs)

        return forward

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", with_bias(modeling_llama.LlamaAttention.forward))
    with pytest.raises(
        CaptureError, match="^LlamaAttention attends with its own attention_mask, which is not supported"
    ):
        capture(tmp_path, "llama")


def test_a_window_that_is_not_handed_over_is_noticed(tmp_path, monkeypatch):
    from transformers.models.gemma3 import modeling_gemma3

    def no_window(forward):
        def call(self, *args, **kwargs):
            self.sliding_window = None
            return forward(self, *args, **kwargs)

        return call

    attention = modeling_gemma3.Gemma3Attention
    monkeypatch.setattr(attention, "forward", no_window(attention.forward))
    with pytest.raises(CaptureError, match="^gemma3_text keeps the window of its 2 sliding layers to itself"):
        capture(tmp_path, "gemma3")


def test_config_is_read_anew_each_time(tmp_path):
    first = capture(tmp_path, "llama", hf_overrides=(("vocab_size", 64),))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["vocab_size"] == zoo.VOCAB
    assert first.parameters["lm_head.weight"][0] == (64, 64)
