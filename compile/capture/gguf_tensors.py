"""Tensors of GGUF files as stored tensors of a checkpoint: every one is decoded from its bytes as it is read."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fuseline.compile.capture.checkpoint import CodedTensor, StoredTensor
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.gguf.block_types import BLOCK_TYPES, PLAIN, BlockType
from fuseline.compile.gguf.blocks import BLOCK_FORMATS, BlockFormat, dequantize_blocks
from fuseline.compile.gguf.header import TensorInfo
from fuseline.compile.gguf.names import ARCHITECTURES, Architecture, Heads, Place, places
from fuseline.compile.gguf.table import TABLE
from fuseline.compile.ops.coded import Coded
from fuseline.compile.quantization.published import Published, Tensors

Rows = Callable[[Tensor], Tensor]
RAW = ""
"""Suffix of the only part of a tensor: its bytes."""


def open_unpacked(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor by its name in checkpoints of Transformers. Raises LoadError."""
    try:
        table = json.loads((folder / TABLE).read_text())
        files = [Path(file) for file in table["files"]]
        tensors = [TensorInfo(name, files[file], type_id, tuple(shape), begin)
                   for name, file, type_id, shape, begin in table["tensors"]]  # fmt: skip
        architecture, heads = ARCHITECTURES[table["architecture"]], Heads(*table["heads"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise LoadError(f"{folder / TABLE} is damaged ({type(error).__name__}): remove {folder}") from error
    return stored_tensors(architecture, heads, tensors)


def stored_tensors(
    architecture: Architecture, heads: Heads, tensors: Sequence[TensorInfo]
) -> dict[str, StoredTensor]:  # fmt: skip
    """By name in checkpoints of Transformers. Raises LoadError for a tensor that the architecture has not."""
    found: dict[str, StoredTensor] = {}
    for info in tensors:
        try:
            for place in places(architecture, heads, info.name, info.shape):
                found[place.name] = _stored(info, place, heads.dim)
        except (KeyError, IndexError) as error:
            raise LoadError(f"{info.name} in {info.path}, of shape {list(info.shape)}, is no tensor of "
                            f"{architecture.model_type} that is known here") from error  # fmt: skip
    return found


def _stored(info: TensorInfo, place: Place, head_dim: int) -> CodedTensor:
    block = BLOCK_TYPES[info.type_id]
    num_in = place.shape[-1] if len(place.shape) > 1 else 1
    if num_in % block.size:
        raise LoadError(f"{info.name} in {info.path} has one dim and is quantized ({block.name})")
    row_bytes = num_in // block.size * block.num_bytes
    num_rows = prod(place.shape) // num_in
    together = head_dim if place.paired else 1
    if num_rows % together:
        raise LoadError(f"{info.name} in {info.path} has {num_rows} rows, no multiple of a head's {head_dim}")
    meta = torch.empty(num_rows // together, together * row_bytes, dtype=torch.uint8, device="meta")
    begin = info.begin + place.first_row * row_bytes
    part = StoredTensor(info.name, info.path, begin, meta)
    values = torch.empty(place.shape, dtype=torch.float32, device="meta")
    return CodedTensor(place.name, info.path, begin, values, _published(block, place, together), {RAW: part})


def _published(block: BlockType, place: Place, together: int) -> Published:
    form = BLOCK_FORMATS.get(block.name)
    rows = functools.partial(_rows, together)
    if form is not None:
        decode = functools.partial(_codes, form, block, rows)
        return Published(form.layout, place.shape, decode, {RAW: together})
    values = functools.partial(_values, block, rows, place)
    return Published(None, place.shape, values, {RAW: together}, is_plain=block.name in PLAIN)


def _rows(together: int, raw: Tensor) -> Tensor:
    """[N / together, bytes of as many rows] -> [N, bytes of a row], where pairs lie apart by half of `together`."""
    if together == 1:
        return raw
    return raw.unflatten(1, (together // 2, 2, -1)).transpose(1, 2).flatten(0, 2)


def _codes(form: BlockFormat, block: BlockType, rows: Rows, tensors: Tensors) -> Coded:
    return form.decode(rows(tensors[RAW]).unflatten(-1, (-1, block.num_bytes)))


def _values(block: BlockType, rows: Rows, place: Place, tensors: Tensors) -> Tensor:
    raw = rows(tensors[RAW])
    if block.name in PLAIN:
        values = raw.contiguous().view(getattr(torch, PLAIN[block.name])).float()
    else:
        values = dequantize_blocks(block.name, raw)
    return values.reshape(-1, *place.shape[1:]) - int(place.adds_one)
