"""The model check: right models get a verdict that is kept, wrong ones are refused in a line before they serve."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from python_process import run_python
from zoo import COMMON, IDS, LONG_FACTORS, VOCAB

from fuseline.compile.capture.errors import CaptureError, LoadError, told_as
from fuseline.compile.capture.export import num_decoder_layers, resolve_dtype
from fuseline.compile.capture.reference import RandomModel
from fuseline.compile.compiler import optimize
from fuseline.compile.config import STORED, CompileConfig
from fuseline.compile.model_info import eos_ids
from fuseline.compile.report import explain

BART: dict[str, Any] = dict(
    d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=VOCAB, is_encoder_decoder=False, is_decoder=True,
)  # fmt: skip
PHIMOE_ROPE = dict(
    rope_type="longrope", rope_theta=10000.0, short_factor=LONG_FACTORS, long_factor=[2 * f for f in LONG_FACTORS],
    short_mscale=1.2, long_mscale=1.4,
)  # fmt: skip


def publish(config: transformers.PreTrainedConfig, folder: Path) -> CompileConfig:
    RandomModel(config, trust_remote_code=False)._model.save_pretrained(folder / "model")
    return CompileConfig(str(folder / "model"), cache_dir=str(folder / "cache"))


def llama(**fields: Any) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(**COMMON | fields, **IDS)


def bart() -> transformers.PreTrainedConfig:
    return transformers.BartConfig(**BART)


def test_verdict_is_told_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, phases = publish(llama(), tmp_path), []
    verdict = optimize(config, progress=lambda phase, done, total: phases.append((phase, done)))[0].verdict
    assert verdict.startswith("checked: a copy of 3 layers")
    assert phases == [("checking", 0), ("checking", 1)]
    monkeypatch.setattr("fuseline.compile.compiler.check_model", None)  # a second check would fail
    assert optimize(config)[0].verdict == verdict
    assert verdict in explain(config)


def test_wrong_model_is_refused_in_one_line(tmp_path: Path) -> None:
    """Bart counts its positions from the first token of the step, so all but a prompt's first chunk are wrong."""
    config = publish(bart(), tmp_path)
    for _ in range(2):  # the graph of a refused model is not kept
        message = r"^bart would answer wrongly: .*token 10 .* counts positions .*--skip-model-check"
        with pytest.raises(CaptureError, match=message) as caught:
            optimize(config)
        assert "\n" not in str(caught.value)
    assert "would answer wrongly" in explain(config)


def test_scale_of_long_sequences_is_chosen_by_each(tmp_path: Path) -> None:
    """PhiMoE scales its rotations by the longest sequence of a batch; the check's two stand on either side."""
    fields = COMMON | dict(num_local_experts=4, rope_parameters=PHIMOE_ROPE | dict(original_max_position_embeddings=32))
    config = publish(transformers.PhimoeConfig(**fields, **IDS), tmp_path)
    assert optimize(config)[0].verdict.startswith("checked")


def test_skipped_check_does_not_count_as_one(tmp_path: Path) -> None:
    """A model that was served unchecked is checked by the first start without the flag."""
    config = publish(bart(), tmp_path)
    skipping = CompileConfig(config.model, cache_dir=config.cache_dir, skip_model_check=True)
    assert optimize(skipping, keep=True)[0].verdict == ""
    with pytest.raises(CaptureError, match="would answer wrongly"):
        optimize(config)


def test_warm_start_needs_no_transformers(tmp_path: Path) -> None:
    config = publish(llama(), tmp_path)
    verdict = optimize(config, keep=True)[0].verdict
    program = (
        "import sys; from fuseline.compile.compiler import load_optimized; from fuseline.compile.config import *;"
        f"found = load_optimized(CompileConfig({config.model!r}, cache_dir={config.cache_dir!r}));"
        "print(found[0].verdict, 'transformers' in sys.modules)"
    )
    assert run_python(program) == f"{verdict} False"


def test_small_copies_keep_what_matters() -> None:
    from fuseline.compile.capture.small_config import small_config

    large = llama(num_hidden_layers=40, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, vocab_size=999)
    small = small_config(large, 3)
    assert (small.num_hidden_layers, small.vocab_size) == (3, 256)
    assert small.num_attention_heads == 4 * small.num_key_value_heads > 4
    assert torch.tensor([small.hidden_size, small.num_attention_heads * small.head_dim]).unique().numel() == 1


def test_model_that_cannot_be_compared_is_served_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: object, tokens: object) -> None:
        raise RuntimeError("its code needs a GPU")

    config = publish(llama(), tmp_path)
    monkeypatch.setattr(RandomModel, "logits", fail)
    verdict = optimize(config)[0].verdict
    assert verdict == "not checked: Transformers cannot run a small copy (its code needs a GPU)"
    assert "llama cannot be compared with Transformers before it is served" in caplog.text


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is no valid JSON"),
        ("[1]", "eos_token_id must be"),
        ('{"eos_token_id": "two"}', "eos_token_id must be"),
        ('{"eos_token_id": [1, null]}', "eos_token_id must be"),
        ('{"eos_token_id": true}', "eos_token_id must be"),
    ],
)
def test_broken_generation_config_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(LoadError, match=rf"^{tmp_path}/generation_config.json.*{message}"):
        eos_ids(str(tmp_path), SimpleNamespace(eos_token_ids=(1,)))


def test_dtypes_of_configs() -> None:
    """A model stored in float64 is computed in float32; a dtype that is none is told."""
    for dtype in ("auto", STORED):
        config = CompileConfig("", dtype=dtype)
        assert resolve_dtype(config, SimpleNamespace(dtype=torch.float64)) == torch.float32
        assert resolve_dtype(config, SimpleNamespace(dtype="float64")) == torch.float32
        for wrong in (torch.int8, "nonsense"):
            with pytest.raises(CaptureError, match=f"config.json has dtype {wrong}, .*--dtype"):
                resolve_dtype(config, SimpleNamespace(dtype=wrong))


def test_layers_of_a_decoder_are_counted() -> None:
    """An encoder's layers are not those that attend."""
    assert num_decoder_layers(transformers.BartConfig(**BART | dict(encoder_layers=5))) == 2
    assert num_decoder_layers(llama()) == 3


def test_errors_of_others_become_one_line() -> None:
    with (
        pytest.raises(CaptureError, match=r"^wonder cannot be captured \(KeyError 'complex64'\); this version"),
        told_as(CaptureError, "wonder cannot be captured"),
    ):
        raise KeyError("complex64")
    with pytest.raises(LoadError, match="^its file$"), told_as(CaptureError, "wonder cannot be captured"):
        raise LoadError("its file")


def test_float64_weights_are_served(tmp_path: Path) -> None:
    from paged_driver import greedy
    from safetensors.torch import load_file, save_file

    from fuseline.compile.compiler import compile_model
    from fuseline.compile.target import detect_target

    config = publish(llama(num_hidden_layers=1), tmp_path)
    prompts = [[5, 9, 33, 70], [4, 4, 90]]
    expected = greedy(compile_model(config, detect_target()), prompts, 6)
    path = Path(config.model) / "model.safetensors"
    save_file({name: value.double() for name, value in load_file(path).items()}, path, {"format": "pt"})
    assert greedy(compile_model(config, detect_target()), prompts, 6) == expected
