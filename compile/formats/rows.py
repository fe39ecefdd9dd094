"""A weight as it is: [N, K] in the model's dtype. Ops on plain weights read it; GPU kernels want nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from fuseline.compile.formats.format import Format, Put, Shape, Stored


def _shapes(shape: Shape, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
    return {"": (shape, dtype)}


def _write(stored: Stored, block: Tensor, start: Shape, put: Put) -> None:
    put(stored[""], block, start)


FORMAT = Format("rows", _shapes, _write, targets=("cuda",), is_blockwise=True)
