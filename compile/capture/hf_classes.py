"""The class of Transformers that a config means, built without what reads images and sound.

A model of several media has a text decoder among its parts (`text_config`). With text alone as input its class computes
what that decoder computes, at its own positions; the parts that only media reach are left out, so that neither their
packages nor their weights are needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from unittest.mock import patch

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

from fuseline.compile.capture.errors import CaptureError

AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)


def auto_class(config: PreTrainedConfig, trust_remote_code: bool = False) -> type:
    """The one of Transformers' auto classes that builds the model of a config.

    Code that the checkpoint brings comes first if it is trusted. A config with a text decoder among its parts means a
    class for several media, which knows how its checkpoints name the decoder's weights. Raises CaptureError.
    """
    brought, is_composite = getattr(config, "auto_map", None) or {}, config.get_text_config() is not config
    known = [auto for auto in AUTO_CLASSES if type(config) in auto._model_mapping]
    own = [auto for auto in AUTO_CLASSES if auto.__name__ in brought]
    if own and trust_remote_code:
        return own[0]
    if known:
        return known[-1] if is_composite else known[0]
    if own:
        raise CaptureError(f"{config.name_or_path} needs the Python code it brings: trust it with --trust-remote-code")
    raise CaptureError(f"Transformers has no model of type {config.model_type} that generates text")


def brings_code(config: PreTrainedConfig) -> bool:
    """Whether the model's class comes with the checkpoint, if its code is trusted."""
    return any(auto.__name__ in (getattr(config, "auto_map", None) or {}) for auto in AUTO_CLASSES)


def build_model(config: PreTrainedConfig, trust_remote_code: bool, **settings: object) -> nn.Module:
    """The model of a config, which Transformers may change. Raises CaptureError, and any exception of its own code."""
    config = _generating(config, trust_remote_code)
    auto = auto_class(config, trust_remote_code)
    build = _brought_class(config, auto)._from_config if trust_remote_code and brings_code(config) else auto.from_config
    if config.get_text_config() is config:
        return build(config, **settings)
    try:
        with _only_text(config):
            return _without_images(build(copy.deepcopy(config), **settings))
    except Exception as error:
        with suppress(Exception):  # it may ask more of a part than LeftOut has: it is built whole
            return _without_images(build(config, **settings))
        raise error


def _without_images(model: nn.Module) -> nn.Module:
    """Llama 4's class reads of its text model's output what only a class for several media gives."""
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        model.language_model.register_forward_hook(_give_no_images)
    return model


def _give_no_images(module: nn.Module, inputs: object, output: object) -> None:
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


def _brought_class(config: PreTrainedConfig, auto: type) -> type:
    """The class in the checkpoint's files as they are now: an auto class keeps the first that this process has seen."""
    found = get_class_from_dynamic_module(config.auto_map[auto.__name__], config.name_or_path)
    return add_generation_mixin_to_remote_model(found)


def _generating(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedConfig:
    """The config itself, or of a class that only holds several models (Qwen-Omni) that of the one with the decoder."""
    classes = auto_class(config, trust_remote_code)._model_mapping
    if type(config) not in classes or classes[type(config)].forward is not nn.Module.forward:
        return config
    text = config.get_text_config()
    inner = [one for one in _inside(config)[1:] if one is not text and one.get_text_config() is text]
    return inner[0] if inner else config


class LeftOut(nn.Module):
    """Stands for a part that reads other media than text."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("_anchor", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self._anchor.device

    @property
    def dtype(self) -> torch.dtype:
        return self._anchor.dtype

    def forward(self, *args: object, **kwargs: object) -> None:
        raise CaptureError(f"it computes its {self.config.model_type} for text too, which is not supported")


@contextmanager
def _only_text(config: PreTrainedConfig) -> Iterator[None]:
    """Models inside the one that is built are left out unless the text decoder is part of them, or they of it.

    Their configs are told by their types: a model may copy its config before it builds its parts.
    """
    text = config.get_text_config()
    around = [one for one in _inside(config) if any(inner is text for inner in _inside(one))]
    known = {type(one) for one in [*around, *_inside(text)]}
    build = PreTrainedModel._from_config.__func__

    def build_known(cls: type, config: PreTrainedConfig, **settings: object) -> nn.Module:
        return build(cls, config, **settings) if type(config) in known else LeftOut(config)

    with patch.object(PreTrainedModel, "_from_config", classmethod(build_known)):
        yield


def _inside(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A config and all configs within it."""
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(found for value in inner for found in _inside(value))]
