"""input_activations of compressed-tensors: int8, symmetric, by token or with one input_scale[1]. Others stay plain."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fuseline.compile.ops.coded import BY_TOKEN, STATIC, Coded
from fuseline.compile.quantization.published import Decode, Published, QuantizationError, Tensors

INPUT_SCALE = ".input_scale"


def with_inputs(
    published: Published, groups: Sequence[Mapping[str, Any]], module: str, tensors: Tensors
) -> Published:  # fmt: skip
    """A weight of integers with how its inputs are quantized: as the group says whose targets name the module."""
    if published.layout is None or not published.layout.is_integer:
        return published
    activations = next((_activations(group, tensors) for group in groups if _names(group, module)), "")
    published = replace(published, layout=replace(published.layout, activations=activations))
    if activations != STATIC:
        return published
    return replace(published, decode=functools.partial(_with_input_scale, published.decode))


def _names(group: Mapping[str, Any], module: str) -> bool:
    """Whether a group's targets name the module: by its name, a pattern, or its class. Raises QuantizationError."""
    targets = group.get("targets") or ("Linear",)
    try:
        return any(
            re.match(target.removeprefix("re:"), module) if target.startswith("re:") else
            target == "Linear" or module == target or module.endswith(f".{target}")
            for target in targets
        )  # fmt: skip
    except (re.error, AttributeError, TypeError) as error:
        raise QuantizationError(f"compressed-tensors: targets {targets!r} name no modules: {error}") from error


def _activations(group: Mapping[str, Any], tensors: Tensors) -> str:
    """One of ACTIVATIONS, empty for those that stay plain."""
    inputs = group.get("input_activations") or {}
    if (inputs.get("type", "int"), inputs.get("num_bits"), inputs.get("symmetric", True)) != ("int", 8, True):
        return ""
    if inputs.get("dynamic"):
        return BY_TOKEN if inputs.get("strategy") == "token" else ""
    return STATIC if INPUT_SCALE in tensors and tensors[INPUT_SCALE].numel() == 1 else ""


def _with_input_scale(decode: Decode, tensors: Tensors) -> Coded:
    scale = tensors[INPUT_SCALE].float().reshape(-1)
    if not (scale.isfinite() & (scale > 0)).all():
        raise QuantizationError(f"input_scale is {scale.tolist()}: it must be above 0 and finite")
    return replace(decode(tensors), input_scale=scale)
