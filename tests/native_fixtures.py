"""What the tests of the native kernels share: every ISA of this machine, thread counts, packed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from fuseline import _C

ops = torch.ops.fuseline_cpu
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=_C.available_isas())
def isa(request) -> Iterator[str]:
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
