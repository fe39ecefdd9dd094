"""The Transformers model on the meta device, with attention and experts as one op each."""

from __future__ import annotations

import copy
import sys
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PreTrainedConfig
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fuseline.compile import ops  # noqa: F401  registers the vocabulary
from fuseline.compile.capture.custom_code import move_buffers_to_meta, parameters_on_meta
from fuseline.compile.capture.errors import CaptureError, one_line
from fuseline.compile.capture.hf_classes import brings_code, build_model
from fuseline.compile.capture.hf_experts import experts_forward
from fuseline.compile.capture.hf_overrides import read_config, with_overrides, with_rope
from fuseline.compile.config import CompileConfig
from fuseline.compile.quantization.methods import method_of
from fuseline.compile.quantization.published import QuantizationError
from fuseline.compile.stored_config import ConfigFileError, config_path, read_stored_config

NAME = "fuseline"
SLOPES = "fuseline_slopes"
"""Buffer [H] of a module whose scores are biased by distance (ALiBi)."""
NOT_HOOKED = (
    "its attention does not go through Transformers' attention interface and would be computed without a KV cache, "
    "so this model is refused"
)
NOT_RECURRENT = "its recurrence is none that is known and would be computed without a state, so this model is refused"
SLIDING = {"sliding_attention", "hybrid_sliding"}
ATTENDING = {"full_attention", "chunked_attention", "indexed_attention", "hybrid", *SLIDING}
RECURRENT = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}
LAYER_TYPES = ATTENDING | RECURRENT | {"mlp", "moe"}
NOT_ATTENTION = {"position_ids", "cache_position"}


def load_config(config: CompileConfig) -> PreTrainedConfig:
    """config.json with the overrides and the rope settings merged in. Raises CaptureError."""
    path = config_path(config.config_dir, config.config_format)
    try:
        stored = read_stored_config(config.config_dir, config.config_format)
    except ConfigFileError as error:
        raise CaptureError(str(error)) from error
    try:
        method_of(config)
        found = with_overrides(read_config(config, stored), stored, dict(config.hf_overrides))
        found = with_rope(found, config)
    except CaptureError:
        raise
    except QuantizationError as error:
        raise CaptureError(str(error)) from error
    except (Exception, SystemExit) as error:  # configs check themselves in many ways, and may be code of the model's
        if "trust_remote_code=True" in str(error):
            raise CaptureError(
                f"{config.config_dir} needs the Python code it brings: trust it with --trust-remote-code"
            ) from error
        raise CaptureError(f"{path}: {one_line(error)}") from error
    check_config(found)
    # The model is built plain: how its weights are stored matters only to what reads them.
    for one in (found, found.get_text_config()):
        vars(one).pop("quantization_config", None)
    return found


def check_config(found: PreTrainedConfig) -> None:
    """Raises CaptureError for what would be captured wrong, or not at all after a long time."""
    parts = [found]
    if not found.is_encoder_decoder:
        try:
            parts.append(found.get_text_config())
        except ValueError as error:  # a text encoder beside a decoder
            raise CaptureError(f"{found.model_type} has several models of text; only one decoder is served") from error
    if any(part.is_encoder_decoder for part in parts):
        raise CaptureError(
            f"{found.model_type} is an encoder-decoder model; only decoders that generate text are served"
        )
    if not hasattr(parts[-1], "num_hidden_layers"):
        raise CaptureError(f"{found.model_type} is made of several transformers; only one decoder is served")
    if getattr(parts[-1], "recurrent_kv_cache_mode", "per_loop") != "per_loop":
        raise CaptureError(
            f"{found.model_type} keeps the keys and values of its last loop for all loops, which is not supported: "
            "recurrent_kv_cache_mode must be per_loop"
        )
    unknown = set(getattr(parts[-1], "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        raise CaptureError(
            f"{found.model_type} has layers of type {', '.join(sorted(unknown))}, which are not supported"
        )


def build_on_meta(hf_config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """The causal LM without weights; buffers that hold values (inverse frequencies) are real, on the CPU."""
    AttentionInterface.register(NAME, attention_forward)
    _hook_attention_classes(hf_config)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    settings = {"attn_implementation": NAME, "dtype": dtype}
    is_own_code = trust_remote_code and brings_code(hf_config)
    try:
        with _without_values(is_own_code):
            model = build_model(hf_config, trust_remote_code, **settings).eval()
    except CaptureError:
        raise
    except (Exception, SystemExit) as error:  # a model's own code may raise anything
        if is_own_table(error):
            raise CaptureError(f"{hf_config.model_type}: {NOT_HOOKED}") from error
        raise CaptureError(f"{hf_config.model_type} cannot be built: {one_line(error)}") from error
    if is_own_code:
        move_buffers_to_meta(model)
    if any(hasattr(module, "_apply_gate") for module in model.modules()):
        model.set_experts_implementation(NAME)
    keep_float32(model, dtype)
    return model.requires_grad_(False)


def is_own_table(error: BaseException) -> bool:
    """Whether code looked for our attention in a table of its own, beside Transformers' interface."""
    return isinstance(error, KeyError) and error.args == (NAME,)


def _hook_attention_classes(hf_config: PreTrainedConfig) -> None:
    """Modeling files that choose a class of attention by the interface's name have their plain one for ours."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config.get_text_config()), None)
    for name, classes in vars(sys.modules[model.__module__]).items() if isinstance(model, type) else ():
        if name.endswith("_ATTENTION_CLASSES") and "eager" in classes:
            classes.setdefault(NAME, classes["eager"])


def num_parameters(hf_config: PreTrainedConfig, trust_remote_code: bool) -> int:
    """Count the parameters of the causal LM. Raises any exception of the model's own code."""
    with _without_values(trust_remote_code and brings_code(hf_config)):
        model = build_model(copy.deepcopy(hf_config), trust_remote_code)
    return model.num_parameters()


def _without_values(is_own_code: bool) -> AbstractContextManager[object]:
    """Where models are built without memory for their parameters."""
    return parameters_on_meta() if is_own_code else torch.device("meta")


def keep_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Some parameters stay float32 in a model of half precision; from_pretrained does this as it loads them."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, policies, _ = build_glob_alternation(list(plan))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        match = pattern.search(name)
        if match and tensor.is_floating_point():
            tensor.data = tensor.data.to(plan[policies[match.lastgroup]])


def attention_forward(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    is_causal=None, s_aux=None, relative=None, **unused,
):  # fmt: skip
    """AttentionInterface: one `fuseline::attention` op; the mask is never built.

    ALiBi's slopes and the size of a chunk are attributes of the module (hf_attention.py); relative[1, H, T, R] holds
    biases by distance.
    Raises CaptureError if a tensor is handed over that would be left out: a bias or a mask of the model's own.
    """
    extra = {"attention_mask": attention_mask} | unused
    left_out = sorted(name for name, value in extra.items() if isinstance(value, Tensor) and name not in NOT_ATTENTION)
    if left_out:
        raise CaptureError(
            f"{type(module).__name__} attends with its own {', '.join(left_out)}, which is not supported"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layer = getattr(module, "layer_idx", 0) or 0
    out = torch.ops.fuseline.attention(
        query, key, value, s_aux, layer, float(scale), int(sliding_window or 0), float(softcap or 0.0), bool(causal),
        getattr(module, SLOPES, None), getattr(module, "fuseline_chunk", 0), relative,
    )  # fmt: skip
    return out, None
