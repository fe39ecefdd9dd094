"""Quantized weights of a checkpoint as stored tensors: named, shaped and strided like the plain weight they stand for.

Joining, cutting, renaming and transposing work on them as on any other; the values of a block are decoded as it is
read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.checkpoint import CodedTensor, StoredTensor, open_checkpoint
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.capture.lazy_tensor import LazyTensor, TensorSlice, whole
from fuseline.compile.capture.reader import Reader
from fuseline.compile.config import CompileConfig
from fuseline.compile.formats.format import Format, Stored
from fuseline.compile.ops.coded import Layout
from fuseline.compile.quantization.methods import method_of
from fuseline.compile.quantization.published import Method, QuantizationError

DECODED_CODES = 4 << 20
"""Codes, of a byte each, that are decoded at a time."""
ENCODED_VALUES = 1 << 16
"""Values that are quantized at a time: what is computed of them stays in the cache."""
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


def layout_of(lazy: LazyTensor) -> Layout | None:
    """The layout of a weight all of whose rows are stored as codes of one layout, in place; None for any other."""
    layouts = {part.stored.published.layout if _has_whole_rows(part, lazy) else None for part in lazy.slices}
    return layouts.pop() if len(layouts) == 1 else None


def _has_whole_rows(part: TensorSlice, lazy: LazyTensor) -> bool:
    view = part.view
    is_matrix = isinstance(part.stored, CodedTensor) and view.ndim == 2 and len(part.stored.published.shape) == 2
    return is_matrix and view.shape[1] == lazy.shape[1] and view.stride() == (view.shape[1], 1)


def store_coded(form: Format, lazy: LazyTensor, dtype: torch.dtype, stored: Stored, reader: Reader) -> None:
    """Fills a weight of codes [N, K], some rows at a time: codes as they are stored, plain values quantized.

    `dtype`: what the model has plain values in. Raises LoadError if the weight has codes of another layout.
    """
    is_coded = layout_of(lazy) == form.layout
    step = max(1, (DECODED_CODES if is_coded else ENCODED_VALUES) // lazy.shape[1])
    for part in lazy.slices:
        if not is_coded and isinstance(part.stored, CodedTensor):
            raise LoadError(f"{part.stored.name} is stored as {part.stored.published.layout}, not as {form.layout}")
    if not is_coded:
        for begin in range(0, lazy.shape[0], step):
            rows = lazy_tensor.narrow(lazy, 0, begin, min(begin + step, lazy.shape[0]))
            form.put_coded(stored, form.encode(reader.value(rows).to(dtype)), begin)
        return
    for part in lazy.slices:
        first = part.view.storage_offset() // lazy.shape[1]
        for begin in range(0, part.view.shape[0], step):
            end = min(begin + step, part.view.shape[0])
            form.put_coded(stored, reader.coded(part.stored, first + begin, first + end), part.start[0] + begin)
