"""A launcher whose kernel cannot be compiled without one of its arguments, though a run without it would be fine."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_cases import Case

__all__ = ["CASES"]


def scale(x: Tensor, by: Tensor | None, only: Tensor | None = None) -> None:
    scale_kernel[(1,)](x, by, only)


@triton.jit
def scale_kernel(x, by, only):
    if only is not None:
        if tl.load(only) > 0:
            tl.store(x, tl.load(x) * tl.load(by))


CASES = [
    Case(scale, lambda dtype: {name: torch.empty(8, dtype=dtype, device="meta") for name in ("x", "by", "only")},
         {"dtype": (torch.float32,)}),
]  # fmt: skip
