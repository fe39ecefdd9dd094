"""Checkpoints in the layouts of Marlin's kernels (Frantar et al.): tiles of 16 x 16, permuted for a GPU's registers.

    marlin          B[K / 16, 16 N / 8] int32, s[G, N]: 4 bits, symmetric
    gptq_marlin_24  B_24[K / 32, 16 N * bits / 32] int32: the two of each four inputs that are not zero, 4 or 8 bits;
                    B_meta[K / 32, 2 N] int16: which they are, in CUTLASS's order (reorder_meta of host_reorder.h); s
    compressed-tensors has the latter as weight_packed, meta and scale_packed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization.bits import centered, kind_of, unpack
from fuseline.compile.quantization.published import (
    Method,
    Published,
    QuantizationError,
    Read,
    Tensors,
    dtype_name,
    one_of,
)

TILE = 16
ROWS_OF_META = 64
INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
SPARSE = (".B_24", ".B_meta", ".s")
SPARSE_COMPRESSED = (".weight_packed", ".meta", ".scale_packed")


def read(config: Mapping[str, Any]) -> Method:
    one_of(config.get("bits", 4), (4,), "marlin: bits")
    group = max(config.get("group_size", -1), 0)
    return Method("marlin", (".B", ".s", ".workspace"), functools.partial(_find, group))


def read_24(config: Mapping[str, Any]) -> Method:
    bits = one_of(config.get("bits"), (4, 8), "gptq_marlin_24: bits")
    group = max(config.get("group_size", -1), 0)
    find = functools.partial(find_24, SPARSE, bits, group)
    return Method("gptq_marlin_24", (*SPARSE, ".workspace"), find)


def _find(group: int, module: str, tensors: Tensors, value: Read) -> Published | None:
    if ".B" not in tensors:
        return None
    rows, words = tensors[".B"].shape
    num_in, num_out = rows * TILE, words * 8 // TILE
    layout = _layout(4, group, num_in, tensors[".s"])
    check_shapes(module, num_out, tensors[".s"], layout.num_groups(num_in))
    return Published(layout, (num_out, num_in), _decode)


def _decode(tensors: Tensors) -> Coded:
    weights = untiled(unpack(tensors[".B"], 4), weight_order(INTERLEAVE[4]))
    return Coded(centered(weights.T, 4), scales_of(tensors[".s"]).T)


def find_24(
    names: Sequence[str], bits: int, group: int, module: str, tensors: Tensors, value: Read
) -> Published | None:
    """`names`: suffixes of the codes, the metadata and the scales."""
    packed, meta, scales = names
    if packed not in tensors or meta not in tensors:
        return None
    rows, words = tensors[packed].shape
    num_in, num_out = rows * TILE * 2, words * 32 // bits // TILE
    layout = _layout(bits, group, num_in, tensors[scales])
    check_shapes(module, num_out, tensors[scales], layout.num_groups(num_in))
    if num_out % ROWS_OF_META or tensors[meta].numel() != num_out * num_in // 16:
        raise QuantizationError(f"{module}{meta} has shape {list(tensors[meta].shape)}, which does not fit {num_out} "
                                f"outputs of {num_in} inputs")  # fmt: skip
    return Published(layout, (num_out, num_in), functools.partial(_decode_24, names, bits, num_in))


def _decode_24(names: Sequence[str], bits: int, num_in: int, tensors: Tensors) -> Coded:
    packed, meta, scales = (tensors[name] for name in names)
    kept = untiled(unpack(packed, bits), _weight_order_24(bits)).T
    places = _places(meta.flatten(), len(kept), num_in)
    codes = torch.full((len(kept), num_in), 1 << (bits - 1), dtype=torch.uint8).scatter_(1, places, kept)
    return Coded(centered(codes, bits), _unpermuted(scales, _scale_order_24(scales)).T)


def _layout(bits: int, group: int, num_in: int, scales: Tensor) -> Layout:
    return Layout(kind_of(bits), group if group < num_in else 0, dtype_name(scales))


def check_shapes(module: str, num_out: int, scales: Tensor, num_groups: int) -> None:
    """Raises QuantizationError if scales [G, N] do not fit the codes."""
    if scales.shape != (num_groups, num_out):
        raise QuantizationError(f"{module}: its scales have shape {list(scales.shape)}, but {num_groups} groups and "
                                f"{num_out} outputs are stored")  # fmt: skip


def untiled(values: Tensor, order: Tensor) -> Tensor:
    """Values [K / 16, 16 N] of permuted tiles -> [K, N]. `order`: the place in the tiles of each stored value."""
    tiles = _unpermuted(values, order).unflatten(1, (-1, TILE, TILE))
    return tiles.transpose(1, 2).flatten(0, 1).flatten(1)


def _unpermuted(stored: Tensor, order: Tensor) -> Tensor:
    return stored.reshape(-1, len(order))[:, torch.argsort(order)].reshape(stored.shape)


def weight_order(interleave: Sequence[int], rows: Sequence[int] = (0, 1, 8, 9), step: int = 2) -> Tensor:
    """[1024] places in four tiles: thread i of 32 has `rows` + step * (i % 4) of the columns i / 4 and i / 4 + 8."""
    order = [
        16 * (row + step * (i % 4)) + i // 4 + 8 * half + 256 * tile
        for i in range(32) for tile in range(4) for half in range(2) for row in rows
    ]  # fmt: skip
    return torch.tensor(order).view(-1, len(interleave))[:, interleave].flatten()


def _weight_order_24(bits: int) -> Tensor:
    order = [
        16 * (row + 2 * (i % 4)) + i // 8 * 256 + 8 * (i // 4 % 2) + 4 * half + j
        for i in range(32) for j in range(4) for half in range(2) for row in (0, 1, 8, 9)
    ]  # fmt: skip
    return torch.tensor(order).view(-1, len(INTERLEAVE[bits]))[:, INTERLEAVE[bits]].flatten()


def scales_of(stored: Tensor) -> Tensor:
    """[G, N] of permuted scales; those of whole rows have an order of their own."""
    if len(stored) > 1:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return _unpermuted(stored, torch.tensor(order))


def _scale_order_24(scales: Tensor) -> Tensor:
    inner = (0, 4, 1, 5, 2, 6, 3, 7) if len(scales) > 1 else range(8)
    return torch.tensor([8 * i + j for i in range(8) for j in inner])


def _places(meta: Tensor, num_out: int, num_in: int) -> Tensor:
    """[N, K / 2]: the input of each kept value, from int16 words of four pairs of two bits."""
    columns = num_in // 16
    words = meta[_meta_order(num_out, columns)].view(num_out, columns, 1)
    inner = (words >> torch.arange(0, 16, 2, dtype=torch.int16)) & 3
    fours = torch.arange(num_in // 4).repeat_interleave(2) * 4
    return inner.flatten(1).long() + fours


def _meta_order(num_out: int, columns: int) -> Tensor:
    """[N * columns]: where the word of each row and column is stored."""
    row = torch.arange(num_out).unsqueeze(1).expand(-1, columns)
    column = torch.arange(columns).expand(num_out, -1)
    row = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 32 % 4 // 2 * 32 + row % 64 // 8 * 4
    shift = ((row % 2 == 0) & (column % 2 == 1)).long() - ((row % 2 == 1) & (column % 2 == 0)).long()
    row, column = row + shift, column - shift
    return (column // 2 * num_out * 2 + row * 2 + column % 2).flatten()
