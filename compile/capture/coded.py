"""Quantized weights of a checkpoint as stored tensors: named, shaped and strided like the plain weight they stand for.

Joining, cutting, renaming and transposing work on them as on any other; the values of a block are decoded as it is
read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace

import torch

from fuseline.compile.capture import lazy_tensor
from fuseline.compile.capture.checkpoint import CodedTensor, StoredTensor
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.capture.lazy_tensor import LazyTensor, TensorSlice, whole
from fuseline.compile.capture.load_formats import open_weights
from fuseline.compile.capture.reader import Reader
from fuseline.compile.config import CompileConfig
from fuseline.compile.formats.format import Format, Stored
from fuseline.compile.ops.coded import Layout
from fuseline.compile.quantization.methods import method_of
from fuseline.compile.quantization.published import Method, QuantizationError

DECODED_CODES = 1 << 20
"""Codes, of a byte each, that are decoded at a time: few enough for a cache, with what is made of them on the way."""
DECODED_ROWS = 16
"""Rows that are decoded at a time are a multiple: whole panels."""
ENCODED_VALUES = 1 << 16
"""Values that are quantized at a time: what is computed of them stays in the cache."""
ENCODED_ON_GPU = 1 << 24
"""The same on a GPU, which has enough to do with as many."""
SMALL = 1 << 20
"""Bytes of the largest tensor that is read to find out how a weight is stored."""


def open_stored(config: CompileConfig) -> dict[str, StoredTensor]:
    """Every stored tensor of the checkpoint by name; the tensors of a quantized weight are one. Raises LoadError."""
    stored = open_weights(config)
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

    first = next(iter(parts.values()))
    try:
        published = method.find(module, {suffix: part.meta for suffix, part in parts.items()}, value)
    except QuantizationError as error:
        raise LoadError(f"{first.path}: {error}") from error
    except (KeyError, IndexError, ValueError, TypeError, json.JSONDecodeError) as error:
        raise LoadError(f"{module}: its tensors {', '.join(sorted(parts))} are not those of {method.name} "
                        f"({type(error).__name__} {error}) in {first.path}") from error  # fmt: skip
    if published is None:
        return None
    if published.layout and published.layout.has_order:
        index = next((suffix for suffix in parts if suffix.endswith("g_idx")), "")
        published = replace(published, order=_digest(value(index)) if index else module)
    meta = torch.empty(published.shape, dtype=torch.float32, device="meta")
    meta = meta.mT if published.is_transposed else meta
    return CodedTensor(module + method.weight, first.path, first.begin, meta, published, parts)


def _digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def is_quantized(part: TensorSlice) -> bool:
    return isinstance(part.stored, CodedTensor) and not part.stored.published.is_plain


def layout_of(lazy: LazyTensor) -> Layout | None:
    """The layout of a weight all of whose rows are stored as codes of one layout, in place; None for any other.

    Rows of a matrix must have their inputs in one order. A weight of experts may have its last dims transposed: it is
    stored as its kernels read it, rows by inputs.
    """
    turned = [lazy_tensor.transpose(lazy, -2, -1)] if len(lazy.shape) == 3 else []
    return next(filter(None, map(_layout_of_rows, [lazy, *turned])), None)


def _layout_of_rows(lazy: LazyTensor) -> Layout | None:
    if not all(_has_whole_rows(part, lazy) for part in lazy.slices):
        return None
    layouts = {part.stored.published.layout for part in lazy.slices}
    if len(layouts) > 1 and None not in layouts:
        layouts = {replace(layout, has_fives=False) for layout in layouts}
    matrices = {part.start[:-2] for part in lazy.slices}
    orders = {(part.start[:-2], part.stored.published.order) for part in lazy.slices}
    return layouts.pop() if len(layouts) == 1 and len(orders) == len(matrices) else None


def _is_stored_as(lazy: LazyTensor, layout: Layout) -> bool:
    """Whether a weight's codes are those of a layout: codes of 5 bits are also some of 8."""
    found = _layout_of_rows(lazy)
    return found is not None and layout in (found, replace(found, has_fives=False))


def _has_whole_rows(part: TensorSlice, lazy: LazyTensor) -> bool:
    view, num_in = part.view, lazy.shape[-1]
    is_coded = isinstance(part.stored, CodedTensor) and part.stored.published.shape[-1] == num_in
    return is_coded and view.shape[-1] == num_in and view.stride()[-2:] == (num_in, 1)


def store_coded(form: Format, lazy: LazyTensor, dtype: torch.dtype, stored: Stored, reader: Reader) -> None:
    """Fills a weight of codes [N, K] or [E, N, K], some rows at a time: codes as they are stored, plain ones quantized.

    `dtype`: what the model has plain values in. Raises LoadError if the weight has codes of another layout.
    """
    if len(lazy.shape) == 3:
        for expert, matrix in enumerate(lazy_tensor.unbind(lazy)):
            store_coded(form, matrix, dtype, {name: part[expert] for name, part in stored.items()}, reader)
    elif _is_stored_as(lazy, form.layout):
        for part in lazy.slices:
            _copy_codes(form, part, stored, reader)
    else:
        _quantize(form, lazy, dtype, stored, reader)


def _copy_codes(form: Format, part: TensorSlice, stored: Stored, reader: Reader) -> None:
    """Codes of rows of one stored weight [N, K], or of one of its experts."""
    *_, num_out, num_in = part.stored.published.shape
    expert, first = divmod(part.view.storage_offset() // num_in, num_out)
    is_matrix = len(part.stored.published.shape) == 2
    step = max(1, DECODED_CODES // (num_in * DECODED_ROWS)) * DECODED_ROWS if is_matrix else part.view.shape[0]
    for begin in range(0, part.view.shape[0], step):
        low, high = first + begin, first + min(begin + step, part.view.shape[0])
        coded = reader.coded(part.stored, *((low, high) if is_matrix else (expert, expert + 1)))
        form.put_coded(stored, coded if is_matrix else coded.select(0).narrow(low, high), part.start[0] + begin)


def _quantize(form: Format, lazy: LazyTensor, dtype: torch.dtype, stored: Stored, reader: Reader) -> None:
    for part in lazy.slices:
        if is_quantized(part):
            raise LoadError(f"{part.stored.name} is stored as {part.stored.published.layout}, not as {form.layout}")
    # Rows of a transposed weight are nowhere together: it is read whole.
    is_turned = any(part.view.stride(1) > 1 for part in lazy.slices)
    device = stored["codes"].device
    whole = reader.value(lazy) if is_turned else None
    step = max(1, (ENCODED_VALUES if device.type == "cpu" else ENCODED_ON_GPU) // lazy.shape[1])
    for begin in range(0, lazy.shape[0], step):
        end = min(begin + step, lazy.shape[0])
        rows = reader.value(lazy_tensor.narrow(lazy, 0, begin, end)) if whole is None else whole[begin:end]
        form.put_coded(stored, form.encode(rows.to(device, dtype)), begin)
