"""Large tensors on large pages: what is streamed once a step is read faster when fewer pages must be looked up."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGE_BYTES = 4 << 20
"""From here on a tensor has pages of its own; Linux's large pages have 2 MiB."""


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros whose pages the system supplies when they are first written: torch.zeros would write them all."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < LARGE_BYTES:
        return torch.zeros(tuple(shape), dtype=dtype)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(tuple(shape))
    # Shared mappings, mmap's default, get no large pages.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))
