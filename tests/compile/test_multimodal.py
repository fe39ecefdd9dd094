"""The text decoders of models of several media: greedy tokens equal to those of Transformers' own whole classes.

Checkpoints hold all parts, of random weights, under both spellings of their names; prompts hold text only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from paged_driver import greedy
from safetensors.torch import save_file
from zoo import continue_greedily, tokenizer

from fuseline.api.llm import LLM
from fuseline.compile.backends.cpu_plan.model import CpuModel
from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.capture.export import capture_model
from fuseline.compile.capture.hf_classes import auto_class
from fuseline.compile.capture.reader import Reader
from fuseline.compile.capture.reference import randomize
from fuseline.compile.checkpoint_writer.plan import make_plan
from fuseline.compile.checkpoint_writer.write import write_quantized
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import detect_target

VOCAB, NUM_TOKENS, SECTION = 128, 10, [2, 3, 3]
PROMPTS = [torch.randint(100, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (31, 9, 20)]
IDS: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
TEXT: dict[str, Any] = IDS | dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=VOCAB, max_position_embeddings=256,
)  # fmt: skip
MLA: dict[str, Any] = {name: value for name, value in TEXT.items() if name != "head_dim"}
VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
)  # fmt: skip
QWEN_VISION: dict[str, Any] = dict(
    depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=8, spatial_merge_size=2,
)  # fmt: skip
AUDIO: dict[str, Any] = dict(
    d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=48, num_mel_bins=16,
    max_source_positions=64,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2, moe_intermediate_size=32)
IMAGE: dict[str, Any] = dict(image_token_id=120, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123)
INDEX = dict(image_token_index=120)


def mrope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": SECTION, **more}}


def of_type(name: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": name, **fields}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3Config", dict(  # its head is tied
        text_config=TEXT | dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2,
                                num_hidden_layers=4),
        vision_config=of_type("siglip_vision_model", **VISION), mm_tokens_per_image=4, **INDEX)),
    "mistral3": ("Mistral3Config", dict(
        text_config=of_type("mistral", **TEXT, sliding_window=None), vision_config=of_type("pixtral", **VISION),
        **INDEX)),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", dict(text_config=TEXT | mrope(), vision_config=QWEN_VISION, **IMAGE)),
    "qwen3_vl_moe": ("Qwen3VLMoeConfig", dict(
        text_config=TEXT | EXPERTS | mrope(mrope_interleaved=True) | dict(num_experts=4),
        vision_config=QWEN_VISION | dict(deepstack_visual_indexes=[0], num_position_embeddings=16), **IMAGE)),
    "qwen3_5": ("Qwen3_5Config", dict(
        text_config=TEXT | mrope(mrope_interleaved=True, partial_rotary_factor=1.0) | dict(
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention", "linear_attention"]),
        vision_config=QWEN_VISION | dict(num_position_embeddings=16), **IMAGE)),
    "glm4v": ("Glm4vConfig", dict(
        text_config=TEXT | mrope(partial_rotary_factor=1.0),
        vision_config=QWEN_VISION | dict(out_hidden_size=64, image_size=32), **IMAGE)),
    "glm4v_moe": ("Glm4vMoeConfig", dict(  # its text model alone has the settings that initialize the router
        text_config=TEXT | EXPERTS | mrope(partial_rotary_factor=1.0) | dict(
            n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1),
        vision_config=QWEN_VISION | dict(image_size=32), **IMAGE)),
    "mllama": ("MllamaConfig", dict(  # its second layer attends to images alone
        text_config=MLA | dict(cross_attention_layers=[1], bos_token_id=1, pad_token_id=0) | {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
            vision_output_dim=64, image_size=32, patch_size=8, max_num_tiles=1, supported_aspect_ratios=[[1, 1]],
            intermediate_layers_indices=[0]),
        **INDEX)),
    "lfm2_vl": ("Lfm2VlConfig", dict(
        text_config=of_type("lfm2", **TEXT, layer_types=["conv", "full_attention", "conv"], block_multiple_of=8),
        vision_config=of_type("siglip2_vision_model", **VISION, num_patches=16), image_token_id=120)),
    "kimi_k25": ("Kimi_K25Config", dict(
        text_config=of_type("deepseek_v3", **MLA | EXPERTS | dict(
            num_key_value_heads=4, n_routed_experts=8, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=16, v_head_dim=16, n_group=2, topk_group=1, first_k_dense_replace=1)),
        vision_config=VISION, image_token_id=120)),
    "qwen2_audio": ("Qwen2AudioConfig", dict(
        text_config=of_type("qwen2", **TEXT), audio_config=of_type("qwen2_audio_encoder", **AUDIO),
        audio_token_index=120)),
    "qwen2_5_omni": ("Qwen2_5OmniConfig", dict(
        thinker_config=dict(
            text_config=TEXT | mrope(), vision_config=QWEN_VISION, audio_config=AUDIO | dict(output_dim=64),
            audio_token_id=124, **IMAGE),
        talker_config=TEXT | dict(embedding_size=64), token2wav_config={}, enable_audio_output=False)),
}  # fmt: skip


def whole_class(family: str) -> transformers.PreTrainedModel:
    name, fields = FAMILIES[family]
    config = getattr(transformers, name)(**fields)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        model = auto_class(config).from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        randomize(model)
        # A tied head gives back the token that it reads, unless the layers say more than the embedding.
        getattr(model, "thinker", model).get_input_embeddings().weight.mul_(0.2)
    return model


class Built:
    """A checkpoint of a whole class in both spellings, and its greedy tokens."""

    def __init__(self, family: str, folder: Path) -> None:
        model = whole_class(family)
        generating = getattr(model, "thinker", model)
        found = [continue_greedily(generating, prompt, NUM_TOKENS) for prompt in PROMPTS]
        self.expected = [tokens for tokens, _ in found]
        self.margin = min(min(margins) for _, margins in found)
        self.config, self.folders = model.config, {name: folder / name for name in ("published", "modules")}
        model.save_pretrained(self.folders["published"])
        shutil.copytree(self.folders["published"], self.folders["modules"])
        text = {name for name in model.state_dict() if not is_media(name)}
        self.num_media = len(model.state_dict()) - len(text)
        write_shards(self.folders["modules"], model.state_dict())


def is_media(name: str) -> bool:
    return any(word in name for word in ("vision", "visual", "audio", "talker", "connector", "projector"))


def write_shards(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """The names of the class's own modules; media have a file of their own. Tied weights are stored once."""
    (folder / "model.safetensors").unlink()
    where, seen = {}, set()
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen:
            where[name] = f"model-0000{2 - is_media(name)}-of-00002.safetensors"
        seen.add(tensor.data_ptr())
    for file in set(where.values()):
        kept = {name: state[name].contiguous() for name, of in where.items() if of == file}
        save_file(kept, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.fixture(scope="module", params=FAMILIES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(request.param, tmp_path_factory.mktemp(request.param))


def compiled(folder: Path, **settings: Any) -> CpuModel:
    config = CompileConfig(str(folder), level=1, cache_dir=str(folder.parent / "cache"), **settings)
    return compile_model(config, detect_target(1))


@pytest.mark.parametrize("spelling", ["published", "modules"])
def test_greedy_tokens_equal_the_whole_class(built: Built, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only media reach is neither in the model's weights nor read from the files."""
    opened: list[str] = []
    open_file = Reader._open
    monkeypatch.setattr(Reader, "_open", lambda self, path: opened.append(path.name) or open_file(self, path))
    model = compiled(built.folders[spelling], skip_model_check=True)
    assert built.num_media > 0 and built.margin > 1e-3 and len(set().union(*built.expected)) > 5
    assert greedy(model, PROMPTS, NUM_TOKENS) == built.expected
    assert set(opened) == {"model.safetensors" if spelling == "published" else "model-00002-of-00002.safetensors"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A model with positions of three axes; the folders have a tokenizer too."""
    found = Built("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))
    for folder in found.folders.values():
        tokenizer().save_pretrained(folder, save_jinja_files=False)
    return found


def test_the_model_check_compares_with_the_whole_class(qwen: Built) -> None:
    assert compiled(qwen.folders["published"]).verdict.startswith("checked: a copy of 3 layers")


def test_overrides_reach_the_text_config(qwen: Built) -> None:
    two = compiled(qwen.folders["modules"], skip_model_check=True, hf_overrides={
        "text_config": {"num_hidden_layers": 2}})  # fmt: skip
    assert two.info.num_layers == 2 and len(two.info.cache_specs) == 2


def test_quantized_linears_are_those_of_the_text_decoder(qwen: Built, tmp_path: Path) -> None:
    """Linears that read images stay plain and are listed as such; the checkpoint serves, under both spellings."""
    found = []
    for spelling, folder in qwen.folders.items():
        plan = make_plan(CompileConfig(str(folder)), "int8")
        write_quantized(plan, tmp_path / spelling)
        ignored = json.loads((tmp_path / spelling / "config.json").read_text())["quantization_config"]["ignore"]
        assert any("visual" in name for name in ignored) and "lm_head" in ignored
        assert plan.layouts and not any("visual" in name for name in plan.layouts)
        model = compiled(tmp_path / spelling, skip_model_check=True)
        assert model.info.quantized == ("21 as int8/32/float32",)
        found.append(greedy(model, PROMPTS, NUM_TOKENS))
    assert found[0] == found[1] and len(set(found[0][0])) > 3


def test_a_chat_of_parts_of_text(qwen: Built) -> None:
    """And generation_config.json, from which the end of an answer comes."""
    folder = qwen.folders["modules"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    parts = [{"type": "text", "text": "w1 w2"}, {"type": "text", "text": "w3"}]
    with LLM(str(folder), show_progress=False, cache_dir=str(folder.parent / "cache"), skip_model_check=True) as llm:
        first, second = (
            llm.chat([{"role": "user", "content": content}], {"temperature": 0, "max_tokens": 4})[0]
            for content in (parts, "w1 w2\nw3")
        )
        assert first.outputs[0].token_ids == second.outputs[0].token_ids
        with pytest.raises(Exception, match="this model's images are not served yet"):
            llm.chat([{"role": "user", "content": [*parts, {"type": "image_url", "image_url": {"url": "x"}}]}])


REFUSED = {
    "florence2": (lambda: transformers.Florence2Config(), "florence2 is an encoder-decoder model"),
    "whisper": (lambda: transformers.WhisperConfig(), "whisper is an encoder-decoder model"),
    "blip-2": (
        lambda: transformers.Blip2Config(text_config=of_type("t5")), "blip-2 is an encoder-decoder model",
    ),
    "paligemma": (
        lambda: transformers.PaliGemmaConfig(
            text_config=of_type("gemma", **TEXT), vision_config=of_type("siglip_vision_model", **VISION),
            projection_dim=64, **INDEX),
        "paligemma attends to later tokens too",
    ),
    "idefics": (lambda: transformers.IdeficsConfig(**IDS), "IdeficsForVisionText2Text cannot be captured as one graph"),
    "clip": (lambda: transformers.CLIPConfig(), "Transformers has no model of type clip that generates text"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_no_decoder_of_text_alone_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    make().save_pretrained(tmp_path)
    with pytest.raises(CaptureError, match=f"^{message}") as caught:
        capture_model(CompileConfig(model=str(tmp_path)))
    assert "\n" not in str(caught.value)
