"""--hf-overrides, --rope-scaling and --rope-theta in a config of Transformers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.config import CompileConfig
from fuseline.compile.overrides import merged, whole_lengths, with_fewer_layers
from fuseline.compile.stored_config import CONFIG, config_path


def read_config(config: CompileConfig, stored: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a checkpoint whose config.json holds `stored`. Raises any exception of the config's own checks."""
    whole, kind = whole_lengths(stored), stored.get("model_type")
    is_made = config_path(config.config_dir, config.config_format).name != CONFIG
    if (is_made or repr(whole) != repr(dict(stored))) and kind in CONFIG_MAPPING:
        return CONFIG_MAPPING[kind].from_dict(whole)
    return AutoConfig.from_pretrained(config.config_dir, trust_remote_code=config.trust_remote_code)


def with_overrides(
    found: PreTrainedConfig, stored: Mapping[str, Any], overrides: Mapping[str, Any]
) -> PreTrainedConfig:  # fmt: skip
    """The config of the merged config.json, so that what Transformers derives from a value follows it.

    Raises CaptureError for a key that the config has not, and any exception of the config's own checks.
    """
    if not overrides:
        return found
    values = with_fewer_layers(whole_lengths(merged(stored, overrides)), stored)
    kind = values.get("model_type", found.model_type)
    if kind != found.model_type and kind not in CONFIG_MAPPING:
        raise CaptureError(f"--hf-overrides: Transformers has no model_type {kind!r}")
    config_class = type(found) if kind == found.model_type else CONFIG_MAPPING[kind]
    _check_keys(found if kind == found.model_type else config_class(), stored, overrides, "")
    made = config_class.from_dict(values)
    made._name_or_path = found._name_or_path
    return made


def _check_keys(config: PreTrainedConfig, stored: Mapping[str, Any], overrides: Mapping[str, Any], path: str) -> None:
    """`config` was made without the overrides: a key that it has not is misspelled, or another model's."""
    known = {*stored, *config.to_dict(), *config.attribute_map, "rope_scaling", "rope_theta"}
    for key, value in overrides.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise CaptureError(f"--hf-overrides: {type(config).__name__} has no key {path + key!r}{hint}")
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig) and isinstance(value, Mapping):
            _check_keys(inner, stored.get(key) or {}, value, f"{path}{key}.")


def with_rope(config: PreTrainedConfig, settings: CompileConfig) -> PreTrainedConfig:
    """The config with the scaling of rotary embeddings replaced, in place. Raises CaptureError where there are none."""
    scaling, theta = dict(settings.rope_scaling), settings.rope_theta
    if not scaling and theta is None:
        return config
    if scaling:
        _check_type(scaling)
    text = config.get_text_config()
    if not getattr(text, "rope_parameters", None):
        flag = "--rope-scaling" if scaling else "--rope-theta"
        raise CaptureError(f"{flag}: a {text.model_type} model has no rotary embeddings; leave it out")
    nested = text.nested_rope_parameter_keys(text.rope_parameters)
    names = ["full_attention"] if "full_attention" in nested else nested
    if names:  # layers with a window keep their own
        changed = {name: _changed(text.rope_parameters[name], scaling, theta) for name in names}
        text.rope_parameters = {**text.rope_parameters, **changed}
    else:
        text.rope_parameters = _changed(text.rope_parameters, scaling, theta)
    try:
        text.standardize_rope_params()
        text.validate_rope()
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CaptureError(f"--rope-scaling {scaling}: {error.args[0] if error.args else error}") from error
    return config


def _check_type(scaling: Mapping[str, Any]) -> None:
    kind, known = scaling.get("rope_type", scaling.get("type")), ("default", *ROPE_INIT_FUNCTIONS)
    if kind not in known:
        raise CaptureError(f"--rope-scaling: rope_type {kind!r} is none of {', '.join(sorted(known))}")
    factor = scaling.get("factor")
    if factor is not None and not (isinstance(factor, int | float) and factor >= 1):
        raise CaptureError(f"--rope-scaling: factor {factor!r} is no number of at least 1")


def _changed(old: Mapping[str, Any], scaling: Mapping[str, Any], theta: float | None) -> dict[str, Any]:
    kept = {name: old[name] for name in ("rope_theta", "partial_rotary_factor", "mrope_section") if name in old}
    new = {**kept, **scaling} if scaling else dict(old)
    if "type" in new:
        new.setdefault("rope_type", new.pop("type"))
    return new if theta is None else {**new, "rope_theta": theta}
