"""Shared by tests of native kernels: every ISA of this machine, thread counts, packed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fuseline import _C

ops = torch.ops.fuseline_cpu
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EXTENDING_ISAS = ("avxvnni", "avx512vnni", "amx")
"""Differ from those they extend in `linear` and in products of integers only (csrc/cpu/isa/isa.cpp)."""


@pytest.fixture(params=[isa for isa in _C.available_isas() if isa not in EXTENDING_ISAS])
def isa(request) -> Iterator[str]:
    yield from switched_to(request)


@pytest.fixture(params=_C.available_isas())
def any_isa(request) -> Iterator[str]:
    yield from switched_to(request)


def switched_to(request) -> Iterator[str]:
    before, threads = _C.cpu_isa(), _C.num_threads()
    _C.set_cpu_isa(request.param)
    _C.set_num_threads(1)
    yield request.param
    _C.set_cpu_isa(before)
    _C.set_num_threads(threads)


def with_threads(count: int, fn: Callable[[], torch.Tensor]) -> torch.Tensor:
    before = _C.num_threads()
    _C.set_num_threads(count)
    try:
        return fn()
    finally:
        _C.set_num_threads(before)


def pack(*weights: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """panels[ceil(N/16)][K][16] of the rows of all weights, one under the other."""
    rows, num_k = sum(len(w) for w in weights), weights[0].shape[1]
    panels = torch.zeros(-(-rows // 16), num_k, 16, dtype=dtype or weights[0].dtype)
    at = 0
    for weight in weights:
        ops.pack_panels(panels, weight, at)
        at += len(weight)
    return panels


def key_panels(cache: torch.Tensor) -> torch.Tensor:
    """A cache [N, K, B, D] of plain keys in the layout of the native kernels (csrc/cpu/kernels/keys.h)."""
    out, given = torch.empty_like(cache), cache.contiguous()
    as_bytes(out)[key_places(cache)] = as_bytes(given)
    return out


def plain_keys(cache: torch.Tensor) -> torch.Tensor:
    return as_bytes(cache)[key_places(cache)].view(cache.dtype).view(cache.shape)


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """One of codes as plain bytes, which torch can index; all flat."""
    return cache.view(torch.uint8).view(-1) if cache.itemsize == 1 else cache.view(-1)


def key_places(cache: torch.Tensor) -> torch.Tensor:
    """Where number i of a plain cache lies, block for block [B / W][D][W], bf16 in pairs of D, bytes in fours."""
    num_blocks, block_size, dim = cache.shape[:2].numel(), *cache.shape[2:]
    lanes = 16 if block_size % 16 == 0 else block_size
    key, d = torch.arange(block_size)[:, None], torch.arange(dim)[None]
    is_pair = (d | 1) < dim if cache.dtype == torch.bfloat16 else torch.zeros_like(d, dtype=torch.bool)
    in_panel = torch.where(is_pair, (d & ~1) * lanes + 2 * (key % lanes) + (d & 1), d * lanes + key % lanes)
    if cache.itemsize == 1:
        in_panel = (d & ~3) * lanes + 4 * (key % lanes) + (d & 3)
    in_block = (key - key % lanes) * dim + in_panel
    return (torch.arange(num_blocks)[:, None] * block_size * dim + in_block.flatten()).flatten()
