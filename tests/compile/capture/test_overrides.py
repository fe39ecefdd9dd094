"""--hf-overrides, --rope-scaling and --rope-theta in the config that is captured, and what dynamic rope computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.capture.hf_model import load_config
from fuseline.compile.compiler import optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.overrides import merged, whole_lengths

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
         "max_position_embeddings": 32, "rope_theta": 10000.0}  # fmt: skip
GEMMA = {"model_type": "gemma3_text", "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
         "rope_theta": 1e6, "rope_local_base_freq": 1e4}  # fmt: skip
NESTED = {"model_type": "gemma3", "text_config": GEMMA}


def loaded(folder: Path, config: dict[str, Any], **settings: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    frozen = {name: tuple(value.items()) if isinstance(value, dict) else value for name, value in settings.items()}
    return load_config(CompileConfig(str(folder), **frozen))


def test_objects_are_merged_at_any_depth() -> None:
    assert merged({"a": {"b": {"c": 1, "d": 2}}, "e": 3}, {"a": {"b": {"c": 9}}, "e": {"f": 1}}) == {
        "a": {"b": {"c": 9, "d": 2}}, "e": {"f": 1},
    }  # fmt: skip
    assert whole_lengths({"n_ctx": 8.0, "text_config": {"n_positions": 2.5}, "rope_theta": 8.0}) == {
        "n_ctx": 8, "text_config": {"n_positions": 2.5}, "rope_theta": 8.0,
    }  # fmt: skip


def test_nested_overrides_leave_the_rest(tmp_path: Path) -> None:
    config = loaded(tmp_path, NESTED, hf_overrides={"text_config": {"hidden_size": 96, "sliding_window": 8}})
    assert (config.text_config.hidden_size, config.text_config.sliding_window) == (96, 8)
    assert config.text_config.num_hidden_layers == 2 and config.model_type == "gemma3"


def test_fewer_layers_shorten_what_is_listed_by_layer(tmp_path: Path) -> None:
    config = loaded(tmp_path, GEMMA, hf_overrides={"num_hidden_layers": 1})
    assert config.layer_types == ["sliding_attention"] and config.num_hidden_layers == 1
    nested = loaded(tmp_path, NESTED, hf_overrides={"text_config": {"num_hidden_layers": 1}})
    assert nested.text_config.layer_types == ["sliding_attention"]
    with pytest.raises(CaptureError, match="layer_types"):
        loaded(tmp_path, GEMMA, hf_overrides={"num_hidden_layers": 3})


def test_what_is_derived_follows(tmp_path: Path) -> None:
    config = loaded(tmp_path, LLAMA, hf_overrides={"hidden_size": 64, "rope_theta": 5.0})
    assert config.head_dim == 16 and config.rope_parameters["rope_theta"] == 5.0


@pytest.mark.parametrize(
    ("config", "overrides", "words"),
    [
        (LLAMA, {"hiden_size": 3}, "LlamaConfig has no key 'hiden_size' (did you mean hidden_size?)"),
        (LLAMA, {"to_dict": 3}, "no key 'to_dict'"),
        (NESTED, {"text_config": {"hiden_size": 3}}, "Gemma3TextConfig has no key 'text_config.hiden_size'"),
        (LLAMA, {"model_type": "no"}, "no model_type 'no'"),
        (LLAMA, {"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_keys_that_a_config_has_not_are_refused(tmp_path: Path, config, overrides, words: str) -> None:
    with pytest.raises(CaptureError) as error:
        loaded(tmp_path, config, hf_overrides=overrides)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_lengths_may_be_floats(tmp_path: Path) -> None:
    assert loaded(tmp_path, {**LLAMA, "max_position_embeddings": 32.0}).max_position_embeddings == 32
    assert loaded(tmp_path, LLAMA, hf_overrides={"max_position_embeddings": 64.0}).max_position_embeddings == 64


@pytest.mark.parametrize(
    ("config", "settings", "parameters"),
    [
        (LLAMA, {"rope_theta": 5.0}, {"rope_type": "default", "rope_theta": 5.0}),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}},
         {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
         {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 7.0},
         {"rope_type": "yarn", "factor": 4.0, "rope_theta": 7.0, "original_max_position_embeddings": 32}),
        ({"model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 500}, {"rope_theta": 9.0},
         {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 0.25}),
    ],
)  # fmt: skip
def test_rope_settings_replace_those_of_the_checkpoint(tmp_path: Path, config, settings, parameters) -> None:
    assert loaded(tmp_path, config, **settings).rope_parameters == parameters


def test_layers_with_a_window_keep_their_rope(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    found = loaded(tmp_path, GEMMA, rope_scaling=scaling, rope_theta=5.0).rope_parameters
    assert found["full_attention"] == {**scaling, "rope_theta": 5.0}
    assert found["sliding_attention"]["rope_theta"] == 1e4 and found["sliding_attention"]["rope_type"] == "default"


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        ({"model_type": "gpt2"}, {"rope_theta": 5.0}, "--rope-theta: a gpt2 model has no rotary embeddings"),
        ({"model_type": "gpt2"}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "--rope-scaling: a gpt2"),
        (LLAMA, {"rope_scaling": {"rope_type": "curly"}}, "rope_type 'curly' is none of"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor 'two' is no number"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    ],
)
def test_bad_rope_settings_are_one_line(tmp_path: Path, config, settings, words: str) -> None:
    with pytest.raises(CaptureError) as error:
        loaded(tmp_path, config, **settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_rope_settings_change_the_captured_model(tmp_path: Path) -> None:
    def inv_freq(**settings: Any) -> torch.Tensor:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        config = CompileConfig(str(tmp_path), level=0, skip_model_check=True, cache_dir=str(tmp_path / "c"), **settings)
        captured, _ = optimize(config)
        return next(value for name, value in captured.constants.items() if name.endswith("inv_freq"))

    plain = inv_freq()
    assert torch.equal(inv_freq(rope_scaling=(("rope_type", "linear"), ("factor", 2.0))), plain / 2)
    assert inv_freq(rope_theta=5.0)[1:].gt(plain[1:]).all()


def test_a_model_with_dynamic_rope_passes_the_model_check(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    scaling = (("rope_type", "dynamic"), ("factor", 2.0))
    captured, _ = optimize(CompileConfig(str(tmp_path), rope_scaling=scaling, cache_dir=str(tmp_path / "c")))
    assert captured.verdict.startswith("checked: ") and captured.rope_switch.table_rows == 64


def test_dynamic_rope_is_that_of_transformers_within_and_at_the_extended_context(tmp_path: Path) -> None:
    """Within the original context the base is the original one; a longer sequence has that of the whole context."""
    from fuseline.compile.capture.hf_patches import patch_model

    def model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        return LlamaForCausalLM(LlamaConfig(**LLAMA | {"rope_parameters": scaling, "rope_theta": None})).eval()

    patched = model()
    switch = patch_model(patched)
    rotary = patched.model.rotary_emb
    rotary.long_inv_freq = rotary.fuseline_buffers["long_inv_freq"]
    assert (switch.threshold, switch.table_rows) == (32, 64)
    for length, shift in ((32, 0), (64, 64)):
        tokens, positions = torch.randint(64, (1, length)), torch.arange(length)[None]
        with torch.no_grad():
            expected = model()(tokens, position_ids=positions).logits
            found = patched(tokens, position_ids=positions + shift).logits
        assert torch.allclose(found, expected, atol=1e-5)
