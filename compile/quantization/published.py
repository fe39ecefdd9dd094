"""A method of quantization: the tensors in which checkpoints hold a weight, and how these become codes and scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fuseline.compile.ops.coded import Coded, Layout

Tensors = Mapping[str, Tensor]
"""Published tensors of one weight, by suffix."""
Read = Callable[[str], Tensor]
"""The values of a published tensor, by suffix; only for small ones."""
Decode = Callable[[Tensors], Coded | Tensor]
"""From a weight's tensors, read as its `cuts` say."""


class QuantizationError(ValueError):
    """One line: what is asked for, and what there is."""


@dataclass(frozen=True)
class Published:
    """One weight of a checkpoint."""

    layout: Layout | None
    """None if no kernel reads its codes: `decode` then gives values [N, ...] in float32, as they are loaded."""
    shape: tuple[int, ...]
    """[N, K]; experts with a leading dim."""
    decode: Decode
    cuts: Mapping[str, int] = field(default_factory=dict)
    """Tensors whose first dim is that of the weight, by suffix: rows of the weight that share one of the tensor's.
    Tensors that are not named are read whole."""
    is_transposed: bool = False
    """The model has it as [..., K, N]."""
    order: str = ""
    """What weights have in common whose inputs are stored in the same order; empty for the model's own."""
    is_plain: bool = False
    """Not quantized: values are stored as floats, though not as the model has them."""


@dataclass(frozen=True)
class Method:
    """What a checkpoint's quantization_config says, of all its weights."""

    name: str
    suffixes: tuple[str, ...]
    """Endings of the names of a weight's tensors."""
    find: Callable[[str, Tensors, Read], Published | None]
    """(module, tensors on meta, read): None for a weight that is stored plainly. Raises QuantizationError."""
    weight: str = ".weight"
    """What takes the place of the suffix in the name of the model's parameter."""


Reader = Callable[[Mapping[str, Any]], Method]
"""Reads a quantization_config. Raises QuantizationError."""


def one_of(value: object, allowed: tuple, what: str) -> object:
    """`value`, if it is allowed. Raises QuantizationError."""
    if value not in allowed:
        raise QuantizationError(f"{what} {value!r} is not supported: it must be {' or '.join(map(str, allowed))}")
    return value


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_shape(tensors: Tensors, suffix: str, shape: tuple[int, ...], module: str) -> None:
    """Raises QuantizationError if a tensor has another shape than what those beside it make it."""
    if tuple(tensors[suffix].shape) != shape:
        found = list(tensors[suffix].shape)
        raise QuantizationError(f"{module}{suffix} has shape {found}, but the others make it {list(shape)}")
