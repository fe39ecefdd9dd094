"""The layout that fakes give their results is the one that torch gives."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from fuseline.compile.ops.library import same_layout


def view(rng: random.Random) -> Tensor:
    """A view with permuted, cut, added and repeated dimensions."""
    x = torch.empty([rng.choice((1, 2, 3, 5)) for _ in range(rng.randint(1, 4))], device="meta")
    x = x.permute(rng.sample(range(x.dim()), x.dim()))
    for dim in range(x.dim()):
        if rng.random() < 0.4:
            x = x.narrow(dim, 0, rng.randint(1, x.shape[dim]))
    if rng.random() < 0.3:
        x = x.unsqueeze(rng.randint(0, x.dim()))
    return x.expand(3, *x.shape) if rng.random() < 0.1 else x


def test_a_result_is_laid_out_as_torch_does_it() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        x = view(rng)
        dtype = rng.choice((None, torch.bfloat16))
        ours, theirs = same_layout(x, dtype), torch.empty_like(x, dtype=dtype)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.device == theirs.device
        dims = [dim for dim in range(x.dim()) if x.shape[dim] > 1]  # the stride of one element says nothing
        assert [ours.stride(dim) for dim in dims] == [theirs.stride(dim) for dim in dims], (x.shape, x.stride())
