"""Large tensors come zero, writable, of any shape and dtype, and cost nothing until they are written."""

from __future__ import annotations

import psutil
import pytest
import torch

from fuseline.compile.memory import LARGE_BYTES, zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 3, LARGE_BYTES // 16 + 1])
def test_zeros(rows: int, dtype: torch.dtype) -> None:
    made = zeros((rows, 2, 8), dtype)
    assert torch.equal(made, torch.zeros(rows, 2, 8, dtype=dtype)) and made.is_contiguous()
    made += 1
    assert made.sum() == made.numel() or dtype != torch.float32


def test_memory_is_taken_when_it_is_written() -> None:
    before = psutil.Process().memory_info().rss
    made = zeros((1 << 30,), torch.float32)
    assert psutil.Process().memory_info().rss - before < 16 << 20
    made[: 16 << 20] = 1.0
    assert psutil.Process().memory_info().rss - before >= 64 << 20
