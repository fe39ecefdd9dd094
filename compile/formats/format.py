"""A storage format declares the tensors it stores, how a checkpoint fills them, and the ops that read them.

A weight is [N, K], outputs by inputs, experts with a leading dim. It is loaded block by block straight into its stored
tensors, so that joining (along outputs), transposing and cutting for ranks happen before a format sees a block. A
weight that the checkpoint holds in the format already is copied part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fuseline.compile.ops.coded import Coded, Layout

Shape = tuple[int, ...]
Stored = Mapping[str, Tensor]
"""Stored tensors by part; a format of one tensor calls it ""."""
Put = Callable[[Tensor, Tensor, Shape], None]
"""put(target, block, start) copies a block to target[start : start + block.shape], on any device."""
Pack = Callable[..., tuple[fx.Node, ...]]
"""pack(weight, transposed=False) gives the constants that hold a weight in the format, in the order of its parts."""
Call = tuple[Any, tuple]
"""(op, arguments)."""


@dataclass(frozen=True)
class Format:
    """A way to store a weight."""

    name: str
    shapes: Callable[[Shape, torch.dtype], Mapping[str, tuple[Shape, torch.dtype]]]
    """(shape, dtype) by part of what is stored for a weight of that shape and dtype. Tensors start as zeros."""
    write: Callable[[Stored, Tensor, Shape, Put], None] | None = None
    """Stores a block of the weight that begins at `start`; the block is overwritten afterwards."""
    scan: Callable[[Stored, Tensor, Shape, Put], None] | None = None
    """Sees every block before the first is written, such as to find scales. The checkpoint is then read twice."""
    readers: Mapping[object, Callable[[tuple, Pack], Call | None]] = field(default_factory=dict)
    """By op on plain weights: from its arguments, the call that computes the same from stored tensors; None if there is
    none for these arguments."""
    targets: tuple[str, ...] = ("cpu", "cuda")
    """Kinds of targets that compute linears with it."""
    stored_as: Mapping[str, str] = field(default_factory=dict)
    """Where a checkpoint holds a weight in this format already: by part, the last word of the stored tensor's name,
    such as weight_scale beside weight. Parts are read as they are; several weights are joined along the first dim."""
    is_blockwise: bool = False
    """Whether `write` only puts blocks, wherever the stored tensors lie; else a weight is made in host memory first."""
    layout: Layout | None = None
    """Set for weights of codes, which are stored whole rows at a time in host memory, by the two fields below."""
    put_coded: Callable[[Stored, Coded, int], None] | None = None
    """put_coded(stored, coded, row) stores codes and scales of outputs from `row` on."""
    encode: Callable[[Tensor], Coded] | None = None
    """Quantizes outputs [n, K]."""
    multiples: tuple[int, int] = (1, 1)
    """Outputs and inputs that are stored together: a rank's part of a weight is a multiple of them."""


def rank_range(form: Format, size: int, dim: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """[begin, end) of a rank's part of `size` outputs (dim 0) or inputs (dim 1). Raises ValueError if parts differ."""
    multiple = form.multiples[dim]
    if size % (num_ranks * multiple):
        what = ("outputs", "inputs")[dim]
        raise ValueError(f"{size} {what} in format {form.name} cannot be cut for {num_ranks} ranks: "
                         f"they must be a multiple of {num_ranks * multiple}")  # fmt: skip
    part = size // num_ranks
    return rank * part, (rank + 1) * part


def part_range(whole: tuple[int, int], size: int, part_size: int) -> tuple[int, int]:
    """What [begin, end) of `size` outputs or inputs is of a stored part's dim: all of it where they share one value."""
    return (0, 1) if part_size == 1 else (whole[0] * part_size // size, whole[1] * part_size // size)
