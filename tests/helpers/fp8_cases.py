"""Caches of fp8 for the tests of kernels: the registry's cases over them, and numbers to write there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from ops_cases import cases
from torch import Tensor

from fuseline.compile.ops.library import Op
from fuseline.compile.ops.rope import FP8

CACHED = (
    "write_cache", "rope_cache", "paged_attention", "paged_attention_invariant", "write_latent", "rope_latent",
    "paged_latent_attention", "paged_latent_attention_invariant",
)  # fmt: skip
"""Ops that take scales of a cache."""
SCALES = torch.tensor([0.5]), torch.tensor([0.125])
STORED = (*FP8, torch.uint8)
"""Dtypes of a cache's tensor: bytes are e4m3."""


def over_fp8(op: Op, dtype: torch.dtype, fp8: torch.dtype) -> Iterator[tuple]:
    """The op's cases with caches of fp8 in place of theirs; each without scales and with them."""
    for args in cases(op, dtype):
        named = dict(zip(op.arguments, args, strict=False))
        coded = {name: arg.to(fp8) if name.endswith("_cache") else arg for name, arg in named.items()}
        scales = [name for name in op.arguments if name in ("k_scale", "v_scale", "latent_scale")]
        yield tuple(coded.values())
        yield tuple((coded | dict(zip(scales, SCALES, strict=False))).values())


def numbers(fp8: torch.dtype) -> Tensor:
    """All that are finite, as float32."""
    every = torch.arange(256, dtype=torch.uint8).view(fp8).float()
    return every[every.isfinite()]


def numbers_to_round(fp8: torch.dtype) -> Tensor:
    """All numbers, all halves between two, what is next to those, too small, or no number."""
    there = numbers(fp8).sort().values
    between = (there[1:] + there[:-1]) / 2
    rest = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 1e-40, float("nan"), -float("nan")])
    return torch.cat((there, between, between.nextafter(there[1:]), between.nextafter(there[:-1]), rest,
                      torch.randn(100)))  # fmt: skip


def too_large(stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, the scale that they are divided by, and what comes of them."""
    largest = torch.finfo(fp8_of(stored)).max
    x = torch.tensor([1.1 * largest, -1e9, float("inf"), largest / 2, 0.49 * largest])
    below = (x[-1] * 2).to(fp8_of(stored)).float()
    return x, torch.tensor([0.5]), torch.tensor([largest, -largest, largest, largest, below])


def fp8_of(stored: torch.dtype) -> torch.dtype:
    return torch.float8_e4m3fn if stored == torch.uint8 else stored
