"""Quantized weights of a checkpoint as stored tensors: named, shaped and strided like the plain weight they stand for.

Joining, cutting, renaming and transposing work on them as on any other; the values of a block are decoded as it is
read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from fuseline.compile.capture.checkpoint import CodedTensor, StoredTensor, open_checkpoint
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.capture.lazy_tensor import whole
from fuseline.compile.capture.reader import Reader
from fuseline.compile.config import CompileConfig
from fuseline.compile.quantization.methods import method_of
from fuseline.compile.quantization.published import Method, QuantizationError

SMALL = 1 << 20
"""Bytes of the largest tensor that is read to find out how a weight is stored."""


def open_stored(config: CompileConfig) -> dict[str, StoredTensor]:
    """Every stored tensor of the checkpoint by name; the tensors of a quantized weight are one. Raises LoadError."""
    stored = open_checkpoint(Path(config.model), config.load_format, config.ignore_patterns)
    try:
        method = method_of(config)
        return with_coded(stored, method) if method else stored
    except QuantizationError as error:
        raise LoadError(str(error)) from error


def with_coded(stored: Mapping[str, StoredTensor], method: Method) -> dict[str, StoredTensor]:
    """Raises LoadError, QuantizationError."""
    grouped: dict[str, dict[str, StoredTensor]] = {}
    suffixes = sorted(method.suffixes, key=len, reverse=True)
    for name, tensor in stored.items():
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        if suffix:
            grouped.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
    found = dict(stored)
    for module, parts in grouped.items():
        coded = _coded(module, parts, method)
        if coded is not None:
            for tensor in parts.values():
                del found[tensor.name]
            found[coded.name] = coded
    return found


def _coded(module: str, parts: Mapping[str, StoredTensor], method: Method) -> CodedTensor | None:
    def value(suffix: str) -> torch.Tensor:
        if suffix not in parts or parts[suffix].meta.nbytes > SMALL:
            raise LoadError(f"{module}{suffix} is missing or too large in a checkpoint of {method.name}")
        with Reader() as reader:
            return reader.value(whole(parts[suffix]))

    try:
        published = method.find(module, {suffix: part.meta for suffix, part in parts.items()}, value)
    except (KeyError, IndexError, ValueError, TypeError, json.JSONDecodeError) as error:
        if isinstance(error, QuantizationError):
            raise
        raise LoadError(f"{module}: its tensors {', '.join(sorted(parts))} are not those of {method.name} "
                        f"({type(error).__name__} {error})") from error  # fmt: skip
    if published is None:
        return None
    first = next(iter(parts.values()))
    meta = torch.empty(published.shape, dtype=torch.float32, device="meta")
    meta = meta.mT if published.is_transposed else meta
    return CodedTensor(module + method.weight, first.path, first.begin, meta, published, parts)
