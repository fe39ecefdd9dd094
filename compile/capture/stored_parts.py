"""Weights that a checkpoint holds in one of our formats already, such as int8 values beside their scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.capture.lazy_tensor import LazyTensor
from fuseline.compile.formats.format import Format, Shape
from fuseline.compile.formats.registry import registry
from fuseline.compile.specs import WeightSource

Find = Callable[[str], LazyTensor | None]
WEIGHT = "weight"


def weight_of(name: str) -> str:
    """The weight that a stored tensor is a part of; any other name unchanged."""
    module, _, last = name.rpartition(".")
    known = {word for form in registry().values() for word in form.stored_as.values()}
    return f"{module}.{WEIGHT}" if module and last in known else name


def part_name(weight: str, word: str) -> str:
    """Name of a weight's stored part."""
    return weight.removesuffix(WEIGHT) + word


def stored_parts(source: WeightSource, form: Format, find: Find) -> dict[str, LazyTensor] | None:
    """The weight's stored tensors by part, joined but not read; None for a weight that is stored plainly.

    Raises LoadError if some parts of it are stored and others are not.
    """
    words = form.stored_as
    if not words or source.transpose or not all(name.endswith(f".{WEIGHT}") for name in source.names):
        return None
    found = {part_name(name, word): find(part_name(name, word)) for name in source.names for word in words.values()}
    beside = [lazy for name, lazy in found.items() if not name.endswith(f".{WEIGHT}")]
    if not any(beside):
        return None
    if missing := next((name for name, lazy in found.items() if lazy is None), None):
        raise LoadError(
            f"{missing} is not in the checkpoint, but {' + '.join(source.names)} needs it in format {form.name}: "
            "the checkpoint is not complete"
        )
    return {part: joined([found[part_name(n, word)] for n in source.names], source) for part, word in words.items()}


def check_parts(
    parts: Mapping[str, LazyTensor], wanted: Mapping[str, tuple[Shape, torch.dtype]], source: WeightSource
) -> None:
    """Raises LoadError for a part of another shape than the format stores, or of no such integers."""
    for part, lazy in parts.items():
        shape, dtype = wanted[part]
        found = next((one.view.dtype for one in lazy.slices if one.view.dtype != dtype), dtype)
        if lazy.shape != shape or (dtype != found and not (dtype.is_floating_point and found.is_floating_point)):
            raise LoadError(
                f"{' + '.join(source.names)}: {part} are {found} {list(lazy.shape)} in the checkpoint, but config.json "
                f"and format {source.format} make them {dtype} {list(shape)}: they do not belong together"
            )


def joined(parts: list[LazyTensor], source: WeightSource) -> LazyTensor:
    """The parts of a weight along the first dim. Raises LoadError if their shapes do not fit."""
    try:
        return lazy_tensor.concatenate(parts, 0)
    except ValueError as error:
        raise LoadError(f"{' + '.join(source.names)}: {error}") from error
